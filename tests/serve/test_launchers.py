"""The pair started by other means than two commands: a launcher's environment, and offline from Python."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

import pytest

from vllm_spark.errors import EXIT_LOST
from vllm_spark.executor.rpc import WARM_UP
from vllm_spark.processes.local import CPU_ENVIRONMENT
from vllm_spark.processes.managed import program
from vllm_spark.variables import variable_name

from . import prompts
from .hosts import Hosts
from .process import assert_all_gone, descendant
from .servers import COMMON_ARGUMENTS, Server

ROOT = Path(__file__).parents[2]
OFFLINE = """
import json, sys
from vllm import LLM, SamplingParams
model, prompts, settings = json.loads(sys.argv[1])
llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=1024, additional_config=settings)
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True), use_tqdm=False)
print("\\n" + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def test_the_environment_of_a_launcher(hosts: Hosts, tiny_moe: Path, reference_tokens: list[list[int]]) -> None:
    """torchrun's variables: the same command on both machines, and RANK decides who leads."""
    first, second = hosts
    http, port = str(first.free_port()), str(first.free_port())
    command = [
        *(program("vllm"), "serve", str(tiny_moe), *COMMON_ARGUMENTS, "--host", first.address, "--port", http),
        *("--spark", "--spark-transport", "loopback", "--spark-port", port),
    ]
    common = {"VLLMSPARK_SECRET": secrets.token_hex(16), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    common |= {"MASTER_ADDR": first.address, "MASTER_PORT": "29500"}
    rank1 = second.popen(command, CPU_ENVIRONMENT | common | {"RANK": "1"}, "vllm serve, rank 1")
    rank0 = first.popen(command, CPU_ENVIRONMENT | common | {"RANK": "0"}, "vllm serve, rank 0")
    server = Server(f"http://{first.address}:{http}", rank0, rank1)
    server.wait_until_healthy()
    assert prompts.greedy_tokens(server.client, concurrency=16) == reference_tokens
    rank0.terminate()
    # A launcher waits for both. vLLM gives an engine no time to take its leave, so rank 1 may count it as lost.
    assert rank1.wait(30) in (0, EXIT_LOST)
    assert_all_gone(rank0, rank1)


@pytest.mark.parametrize("way", ["arguments", pytest.param("environment", marks=pytest.mark.thorough)])
def test_offline(hosts: Hosts, tiny_moe: Path, reference_tokens: list[list[int]], way: str) -> None:
    first, second = hosts
    port = first.free_port()
    environment = CPU_ENVIRONMENT | {"VLLMSPARK_SECRET": secrets.token_hex(16)}
    join = [program("vllm-spark"), "join", "--leader", first.address, "--port", str(port), "--once"]
    follower = second.popen(join, environment, "vllm-spark join")
    settings = {"address": first.address, "port": port, "transport": "loopback"}
    given = {"spark": settings} if way == "arguments" else {}
    arguments = json.dumps([str(tiny_moe), prompts.PROMPTS, given])
    if way == "environment":
        environment |= {variable_name(name): str(each) for name, each in {"enable": 1, **settings}.items()}
    leader = first.popen([sys.executable, "-c", OFFLINE, arguments], environment, "offline")
    assert leader.wait(300) == 0
    (tokens,) = (line for line in leader.output().splitlines() if line.startswith("[["))
    assert json.loads(tokens) == reference_tokens
    assert follower.wait(30) == 0
    assert_all_gone(leader, follower)


DYING = """
import json, os, sys
from vllm import LLM, SamplingParams
from vllm_spark.errors import PeerLostError
from vllm_spark.backend.status import engine_failure
model, prompt, settings = json.loads(sys.argv[1])
common = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}

def tokens_of(llm):
    output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True), use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return list(output[0].outputs[0].token_ids)

def left():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
    return [name for name in (*names, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name in os.environ]

try:
    dying = "tests.serve.dying_extension.Dying"
    LLM(model, **common, additional_config={"spark": settings}, worker_extension_cls=dying)
except PeerLostError as error:
    print(f"told: {error}")
print("left by the first:", left())
print("two ranks:", json.dumps(tokens_of(LLM(model, **common, additional_config={"spark": settings}))))
print("reason left:", engine_failure())
print("left by the second:", left())
print("one rank:", json.dumps(tokens_of(LLM(model, **common))))
"""


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["", WARM_UP], ids=["before-the-groups", "last-call"])
def test_a_follower_killed_while_the_engine_starts(
    hosts: Hosts, tiny_moe: Path, reference_tokens: list[list[int]], method: str
) -> None:
    """In the user's own process the start ends with the reason, and later engines, paired or not, forget it."""
    first, second = hosts
    port = first.free_port()
    environment = CPU_ENVIRONMENT | {"VLLMSPARK_SECRET": secrets.token_hex(16), "PYTHONPATH": str(ROOT)}
    join = [program("vllm-spark"), "join", "--leader", first.address, "--port", str(port)]
    follower = second.popen(join, environment | {"DYING_IN": method}, "vllm-spark join")
    settings = {"address": first.address, "port": port, "transport": "loopback"}
    argv = [sys.executable, "-u", "-c", DYING, json.dumps([str(tiny_moe), prompts.PROMPTS[1], settings])]
    leader = first.popen(argv, environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, "offline")
    leader.wait_for_line("Serving ends: .*the follower on .* (closed the connection|broke)", 200)
    leader.wait_for_line("^told: .*the follower on .* start it again if it ended", 60)
    two, one = (leader.wait_for_line(rf"^{ranks}: (\[\d+, .*\])$", 200)[1] for ranks in ("two ranks", "one rank"))
    assert json.loads(two) == json.loads(one) == reference_tokens[1]
    assert leader.wait(60) == 0
    output = leader.output()
    for sentence in ("reason left: None", "left by the first: []", "left by the second: []"):
        assert sentence in output
    follower.terminate()
    assert_all_gone(leader, follower)


USERS_CHILD = """
import json, multiprocessing, signal, sys

def child(model, prompt, settings):
    from vllm import LLM, SamplingParams
    from vllm_spark.errors import SparkError

    common = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
    sampling = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    try:
        try:
            dying = "tests.serve.dying_extension.Dying"
            LLM(model, **common, additional_config={"spark": settings}, worker_extension_cls=dying)
        except SparkError as error:
            print("the start failed:", error)
        llm = LLM(model, **common, additional_config={"spark": settings})
        try:
            while True:
                output = llm.generate(prompt, sampling, use_tqdm=False)
                print("generated:", list(output[0].outputs[0].token_ids))
        except Exception as error:
            print("generating failed:", error)
        llm.llm_engine.engine_core.shutdown()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        print("the user's finally ran")

if __name__ == "__main__":
    # Forked: spawning would need a file to import this from.
    process = multiprocessing.get_context("fork").Process(target=child, args=json.loads(sys.argv[1]))
    process.start()
    process.join()
    print("exit code of the child:", process.exitcode)
"""


def test_a_users_own_child_process_is_not_ended(
    hosts: Hosts, tiny_moe: Path, reference_tokens: list[list[int]]
) -> None:
    """Neither when an engine in it does not start, nor when its pair breaks: the user has things to release."""
    first, second = hosts
    port = first.free_port()
    environment = CPU_ENVIRONMENT | {"VLLMSPARK_SECRET": secrets.token_hex(16), "PYTHONPATH": str(ROOT)}
    join = [program("vllm-spark"), "join", "--leader", first.address, "--port", str(port)]
    follower = second.popen(join, environment | {"DYING_IN": WARM_UP}, "vllm-spark join")
    settings = {"address": first.address, "port": port, "transport": "loopback"}
    argv = [sys.executable, "-u", "-c", USERS_CHILD, json.dumps([str(tiny_moe), prompts.PROMPTS[1], settings])]
    leader = first.popen(argv, environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, "offline, in a child")
    leader.wait_for_line("^the start failed: (the connection to )?the follower on .* start it again if it ended", 200)
    tokens = leader.wait_for_line(r"^generated: (\[\d+, .*\])$", 200)[1]
    assert json.loads(tokens) == reference_tokens[1]
    descendant(follower, "vllm_spark.entrypoints.follower_process").kill()
    leader.wait_for_line("^generating failed: (the connection to )?the follower on .* start it again if it ended", 60)
    leader.wait_for_line("^the user's finally ran$", 60)
    assert leader.wait(60) == 0
    assert "exit code of the child: 0" in leader.output()
    follower.terminate()
    assert_all_gone(leader, follower)
