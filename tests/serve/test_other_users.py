"""Two users with folders of their own: models, drafts and adapters are found by what they are, compared, and copied."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.hub import COMMIT, cache_model
from vllm_spark.models.tiny import make_tiny_model
from vllm_spark.processes.local import CPU_ENVIRONMENT

from .adapters import RANK, make_adapter
from .hosts import Hosts
from .process import Process, assert_all_gone
from .servers import Server, stock_tp1
from .two_users import (
    ADAPTER,
    MODEL,
    OFF,
    PROMPTS,
    RUNTIME_LORA,
    SECRET,
    STEP_SECONDS,
    WITH_ADAPTERS,
    Users,
    join,
    load_adapter,
    serve,
    tokens_of,
)


@pytest.fixture(scope="module")
def users(tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Users:
    made = Users(*(tmp_path_factory.mktemp(name) for name in ("alice", "bob", "shared", "at-bobs")))
    sql = make_adapter(made.shared / "sql")
    for home in (made.alice, made.bob):
        cache_model(tiny_dense, home / "hf/hub", MODEL)
        cache_model(sql, home / "hf/hub", ADAPTER)
    make_adapter(made.shared / "other", seed=1)
    make_tiny_model(made.shared / "draft", "dense", seed=1)
    make_adapter(made.shared / "absent", seed=1)
    make_adapter(made.at_bobs / "other", seed=2)
    make_tiny_model(made.at_bobs / "draft", "dense", seed=2)
    return made


@pytest.fixture(scope="module")
def stock(hosts: Hosts, tiny_dense: Path, users: Users) -> dict[str, list[list[int]]]:
    """What one stock rank answers, without and with the adapter."""
    more = (*WITH_ADAPTERS, "--lora-modules", f"sql={users.shared / 'sql'}", "--served-model-name", MODEL)
    with stock_tp1(hosts[0], tiny_dense, more) as server:
        answers = {name: tokens_of(server, name) for name in (MODEL, "sql")}
    assert answers[MODEL] != answers["sql"]
    return answers


class Pair(NamedTuple):
    """Alice's server and bob's follower."""

    server: Server
    follower: Process


@pytest.fixture(scope="module")
def pair(hosts: Hosts, users: Users) -> Iterator[Pair]:
    """Bob lacks the model's weights at first, and gets them from alice's machine."""
    if hosts[0].namespace is None:
        pytest.skip("needs network namespaces: run as root with iproute2 installed")
    port = str(hosts[0].free_port())
    at_bobs = users.bob / f"hf/hub/models--spark--tiny/snapshots/{COMMIT}/model.safetensors"
    right = at_bobs.read_bytes()
    at_bobs.unlink()
    with join(hosts, users, port) as follower, serve(hosts, users, port, *WITH_ADAPTERS) as server:
        follower.wait_for_line("he weight file model.safetensors is missing on .*: the leader sends it", STEP_SECONDS)
        server.wait_until_healthy()
        assert at_bobs.read_bytes() == right
        yield Pair(server, follower)


def test_each_serves_from_its_own_cache(pair: Pair, stock: dict[str, list[list[int]]]) -> None:
    assert tokens_of(pair.server, MODEL) == stock[MODEL]
    assert "does not fit" not in pair.server.leader.output()
    assert re.search(r"Copied the model spark/tiny: 6\.\d MB in", pair.follower.output())
    assert re.search(r"The follower on .* is copying the model spark/tiny", pair.server.leader.output())


def test_each_loads_an_adapter_from_its_own_cache(pair: Pair, stock: dict[str, list[list[int]]]) -> None:
    assert load_adapter(pair.server, "sql", ADAPTER).status_code == 200
    assert tokens_of(pair.server, "sql") == stock["sql"]


@pytest.mark.parametrize("name", ["other", "absent"])
def test_an_adapter_that_bob_lacks_is_copied(
    pair: Pair, users: Users, stock: dict[str, list[list[int]]], name: str
) -> None:
    """Also where he has another one at the same path, which stays as it is."""
    theirs = contents(users.at_bobs)
    response = load_adapter(pair.server, name, users.shared / name)
    assert response.status_code == 200, response.text
    assert tokens_of(pair.server, name) not in (stock[MODEL], stock["sql"])
    assert contents(users.at_bobs) == theirs
    copies = list((users.bob / ".local/share/vllm-spark/models").glob(f"{name}-*"))
    # Both are the same adapter, so the second is found and not copied.
    assert len(copies) == (name == "other")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_adapter_that_is_nowhere_is_not_found_as_without_a_pair(
    pair: Pair, users: Users, stock: dict[str, list[list[int]]]
) -> None:
    response = load_adapter(pair.server, "none", users.shared / "none")
    assert response.status_code == 404, response.text
    assert "No adapter found for" in response.json()["error"]["message"]
    assert tokens_of(pair.server, MODEL) == stock[MODEL]


def assert_refused(process: Process, *parts: str) -> None:
    assert process.wait(STEP_SECONDS) == 3, process.tail()
    output = process.output()
    assert "Traceback" not in output, output
    for part in parts:
        assert part in output, output


@pytest.mark.thorough
def test_a_draft_model_that_differs_is_refused(namespaces: Hosts, users: Users) -> None:
    """At the start, before anything is loaded."""
    port = str(namespaces[0].free_port())
    draft = users.shared / "draft"
    speculative = {"model": str(draft), "num_speculative_tokens": 2}
    with (
        join(namespaces, users, port, "--once") as follower,
        serve(namespaces, users, port, "--speculative-config", json.dumps(speculative), *OFF) as server,
    ):
        sentence = f"the weight file model.safetensors has other content on .* \\({draft}\\)"
        server.leader.wait_for_line(f"does not fit: {sentence}.*copy the leader's draft model to {draft}", STEP_SECONDS)
        assert_refused(follower, str(draft))
    assert_all_gone(server.leader, follower)


@pytest.mark.thorough
def test_an_adapter_of_the_command_line_that_differs(namespaces: Hosts, users: Users) -> None:
    """vLLM loads it last; what it raises then is a traceback."""
    port = str(namespaces[0].free_port())
    modules = ("--lora-modules", f"other={users.shared / 'other'}")
    with join(namespaces, users, port, "--once") as follower:
        with serve(namespaces, users, port, *WITH_ADAPTERS, *modules, *OFF) as server:
            sentence = "vllm serve --spark: the adapter other cannot be loaded on both machines: the weight file"
            server.leader.wait_for_line(sentence, 2 * STEP_SECONDS)
            assert server.leader.wait(30) == 3
            assert "Traceback" not in server.leader.output()
        assert follower.wait(30) == 0
    assert_all_gone(server.leader, follower)


OFFLINE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm_spark.errors import RefusedError

if __name__ == "__main__":
    model, prompts, settings, rank, adapters = json.loads(sys.argv[1])
    common = dict(dtype="float32", enforce_eager=True, max_model_len=1024, enable_lora=True, max_lora_rank=rank)
    llm = LLM(model, **common, additional_config={"spark": settings})
    greedy = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    for number, adapter in enumerate(adapters, start=1):
        request = LoRARequest(f"adapter-{number}", number, adapter)
        try:
            outputs = llm.generate(prompts, greedy, use_tqdm=False, lora_request=request)
            print("answered:", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
        except RefusedError as error:
            print(f"refused: {error}")
"""


@pytest.mark.thorough
def test_an_adapter_of_a_request(namespaces: Hosts, users: Users, stock: dict[str, list[list[int]]]) -> None:
    """A program hands them to each call; a refused one is an error of that call."""
    port = namespaces[0].free_port()
    settings = {"address": namespaces[0].address, "port": port, "transport": "loopback", "model_sync": "off"}
    adapters = [str(users.shared / "other"), ADAPTER]
    given = json.dumps([MODEL, PROMPTS, settings, RANK, adapters])
    environment = CPU_ENVIRONMENT | SECRET | RUNTIME_LORA | users.environment(users.alice)
    with join(namespaces, users, str(port), "--once") as follower:
        leader = namespaces[0].popen([sys.executable, "-u", "-c", OFFLINE, given], environment, "offline")
        refusal = leader.wait_for_line("^refused: (.*)$", 2 * STEP_SECONDS)[1]
        assert refusal.startswith("the adapter adapter-1 cannot be loaded on both machines: the weight file")
        answer = leader.wait_for_line(r"^answered: (.*)$", STEP_SECONDS)[1]
        assert json.loads(answer) == stock["sql"]
        assert leader.wait(60) == 0
        assert follower.wait(30) == 0
    assert_all_gone(leader, follower)


@pytest.mark.thorough
def test_a_leader_gets_a_model_that_only_its_follower_has(
    namespaces: Hosts, users: Users, tmp_path: Path, stock: dict[str, list[list[int]]]
) -> None:
    """Before its vLLM looks for the name; then it starts as if it had always had the model."""
    port = str(namespaces[0].free_port())
    new = users._replace(alice=tmp_path)
    with join(namespaces, users, port) as follower, serve(namespaces, new, port) as server:
        server.leader.wait_for_line("The model spark/tiny is not complete on this machine; asking", STEP_SECONDS)
        follower.wait_for_line("asks for the model spark/tiny, which is in .* here", STEP_SECONDS)
        server.wait_until_healthy()
        assert tokens_of(server, MODEL) == stock[MODEL]
        place = f"hf/hub/models--spark--tiny/snapshots/{COMMIT}"
        names = {"config.json", "model.safetensors", "tokenizer.json"}
        copied = contents(tmp_path / place)
        assert names <= copied.keys()
        original = contents(users.bob / place)
        assert copied.items() <= original.items()
    assert_all_gone(server.leader, follower)
