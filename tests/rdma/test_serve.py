"""The whole product across two machines: `vllm serve --spark` over RDMA, also while a cable is out.

Some 10 minutes, nearly all of it vLLM's own start under emulation; so only where it is asked for, with
`make test-rdma-serve`.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.serve.hosts import Host
from tests.serve.process import end_all
from tests.serve.prompts import PROMPTS
from tests.serve.servers import COMMON_ARGUMENTS, stock_tp1
from vllm_spark.models.tiny import make_tiny_model
from vllm_spark.processes.local import CPU_ENVIRONMENT, LOOPBACK
from vllm_spark.processes.managed import program

from .conftest import MACHINES
from .machines import CannotRun, Command, Pair, booted

pytestmark = [
    pytest.mark.skipif(
        "VLLMSPARK_RDMA_SERVE" not in os.environ, reason="takes 10 minutes; run it with: make test-rdma-serve"
    ),
    pytest.mark.timeout(3600),
]

MEMORY_MIB = 6144
START_SECONDS = 1500.0
"""Importing vLLM takes 150 s in a machine, and three processes of each side do."""
ANSWER_SECONDS = 600.0
PORT, LEADER_PORT = 8000, 29650
TOKENS = 48
PROMPTS_ASKED = PROMPTS[:3]


@dataclass(frozen=True)
class Served:
    """The pair as it serves."""

    machines: Pair
    model: Path
    leader: Command
    follower: Command

    def ask(self, prompt: str, tokens: int = TOKENS) -> Command:
        """A client in the leader's machine."""
        url = f"http://{LOOPBACK}:{PORT}"
        return self.machines[0].start(["python", "-m", "tests.rdma.ask", url, str(self.model), prompt, str(tokens)])


def tokens_of(asked: Command) -> list[int]:
    """What it printed, after its end."""
    finished = asked.wait(ANSWER_SECONDS)
    assert finished.exit_code == 0, finished.output
    assert "finish length" in finished.stdout, finished.output
    return [int(number) for number in re.findall(r"^token (\d+)$", finished.stdout, re.MULTILINE)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made here; the machines see it under the same path."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny-moe", "moe")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[int]]:
    """What one rank of stock vLLM answers on this machine, before the others are booted."""
    host = Host(0, LOOPBACK, "lo", tmp_path_factory.mktemp("logs"))
    try:
        with stock_tp1(host, model) as server:
            answers = {}
            for prompt in PROMPTS_ASKED:
                answer = server.client.completions.create(
                    model=str(model),
                    prompt=prompt,
                    max_tokens=TOKENS,
                    temperature=0,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )
                answers[prompt] = list((answer.choices[0].model_extra or {})["token_ids"])
            return answers
    finally:
        end_all()


@pytest.fixture(scope="module")
def served(
    model: Path,
    expected: Mapping[str, list[int]],
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Iterator[Served]:
    """`vllm-spark join` on machine 1, `vllm serve --spark` on machine 0, over both rails."""
    environment = CPU_ENVIRONMENT | {
        "VLLMSPARK_SECRET": secrets.token_hex(16),
        "VLLM_ENGINE_READY_TIMEOUT_S": str(int(START_SECONDS)),
        "HOME": "/root",
        # vLLM compiles how a rank masks token ids, also in eager mode. Emulated, g++ takes minutes for it; and this
        # machine's cache, which the machines see, has code for vectors twice as wide, which then reads half of the ids.
        "TORCHDYNAMO_DISABLE": "1",
    }
    address = "10.0.0.1"
    serve = [
        *(program("vllm"), "serve", str(model), *COMMON_ARGUMENTS, "--host", LOOPBACK, "--port", str(PORT)),
        *("--spark", "--spark-address", address, "--spark-port", str(LEADER_PORT), "--spark-transport", "verbs"),
        *("--spark-join-timeout", str(int(START_SECONDS)), "--spark-heartbeat-timeout", "30"),
    ]
    join = [program("vllm-spark"), "join", "--leader", address, "--port", str(LEADER_PORT)]
    try:
        with booted(tmp_path_factory.mktemp("machines"), MEMORY_MIB) as machines:
            pytestconfig.stash[MACHINES] = machines  # for the report of a failure
            leader_machine, follower_machine = machines
            follower = follower_machine.start(join, environment)
            leader = leader_machine.start(serve, environment)
            leader.wait_for_line(r"Application startup complete", START_SECONDS)
            yield Served(machines, model, leader, follower)
    except CannotRun as reason:
        pytest.skip(str(reason))


def test_tokens_are_those_of_one_machine(served: Served, expected: Mapping[str, list[int]]) -> None:
    answers = {prompt: tokens_of(served.ask(prompt)) for prompt in PROMPTS_ASKED}
    assert answers == expected
    assert re.search(r"over verbs on rail 0 \(rxe0\) and rail 1 \(rxe1\)", served.leader.output), served.leader.output


def test_all_cables_are_out_for_three_seconds_in_the_middle_of_an_answer(
    served: Served, expected: Mapping[str, list[int]]
) -> None:
    prompt = PROMPTS_ASKED[0]
    asked = served.ask(prompt)
    asked.wait_for_line(r"^token \d+\n(.*\n)*token \d+$", ANSWER_SECONDS)
    rails = served.machines[0].rails
    for rail in rails:
        rail.unplug()
    served.machines[0].run(["sleep", "3"], timeout=120)
    assert asked.exit_code is None, "the cables were out for nothing: the answer was complete before"
    for rail in rails:
        rail.plug()
    assert tokens_of(asked) == expected[prompt]
    served.leader.wait_for_line(r"Rail \d \(rxe\d\) .*works again", ANSWER_SECONDS)
