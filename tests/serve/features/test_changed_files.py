"""Weights and adapters that change while a server runs: both ranks load what the leader has, as stock vLLM's do.

The follower is another user, with other files under the leader's paths, or none.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import torch
from safetensors.torch import load_file

from tests.hub import cache_model
from tests.serve.adapters import make_adapter
from tests.serve.development import DEVELOPMENT
from tests.serve.hosts import Hosts
from tests.serve.process import Process
from tests.serve.servers import Server, spark_tp2, stock_tp1
from tests.serve.two_users import (
    MODEL,
    OFF,
    RUNTIME_LORA,
    WITH_ADAPTERS,
    Users,
    join,
    load_adapter,
    serve,
    tokens_of,
)
from vllm_spark.models.tiny import make_tiny_model

from .report import EQUAL, ONE_RANK, record

pytestmark = pytest.mark.thorough

Tokens = dict[str, list[list[int]]]


class Files(NamedTuple):
    """What a server is told to load while it serves, under the same paths for each server."""

    weights: Path
    pickled: Path
    damaged: Path
    adapter: Path

    @classmethod
    def below(cls, folder: Path) -> Files:
        """Writes all of them into `folder`, in place of those that a server before has changed."""
        shutil.rmtree(folder, ignore_errors=True)
        files = cls(*(folder / name for name in cls._fields))
        make_tiny_model(files.weights, "dense", seed=1)
        make_tiny_model(files.pickled, "dense", seed=3)
        torch.save(load_file(files.pickled / "model.safetensors"), files.pickled / "pytorch_model.bin")
        (files.pickled / "model.safetensors").unlink()
        make_tiny_model(files.damaged, "moe")
        make_adapter(files.adapter, seed=1)
        return files


def answers_while_files_change(server: Server, files: Files) -> Tokens:
    """Greedy answers before and after each change."""
    answers = {"at the start": tokens_of(server, MODEL)}
    assert load_adapter(server, "sql", files.adapter).status_code == 200
    answers["adapter"] = tokens_of(server, "sql")
    shutil.rmtree(files.adapter)
    make_adapter(files.adapter, seed=2)
    assert load_adapter(server, "sql", files.adapter, load_inplace=True).status_code == 200
    answers["adapter, loaded in place"] = tokens_of(server, "sql")
    shutil.rmtree(files.adapter)
    make_adapter(files.adapter, seed=3)
    answers["adapter, changed after it was loaded in place"] = tokens_of(server, "sql")
    for name, path in (("weights of a path", files.weights), ("pickled weights", files.pickled)):
        assert reload_weights(server, path).status_code == 200
        answers[name] = tokens_of(server, MODEL)
    answers["adapter, with other weights"] = tokens_of(server, "sql")
    make_tiny_model(files.pickled, "dense", seed=4)
    assert reload_weights(server).status_code == 200
    answers["weights that were overwritten"] = tokens_of(server, MODEL)
    return answers


def reload_weights(server: Server, path: Path | None = None) -> httpx.Response:
    body = {"method": "reload_weights", "kwargs": {} if path is None else {"weights_path": str(path)}}
    with httpx.Client(trust_env=False, timeout=120) as client:
        return client.post(f"{server.url}/collective_rpc", json=body)


@pytest.fixture(scope="module")
def users(tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Users:
    """Both have the model; what is loaded later, bob has in part and with another content."""
    made = Users(*(tmp_path_factory.mktemp(name) for name in ("alice", "bob", "shared", "at-bobs")))
    for home in (made.alice, made.bob):
        cache_model(tiny_dense, home / "hf/hub", MODEL)
    make_tiny_model(made.at_bobs / "files/weights", "dense", seed=7)
    make_adapter(made.at_bobs / "files/adapter", seed=7)
    make_tiny_model(made.shared / "never copied", "dense", seed=8)
    make_tiny_model(made.at_bobs / "never copied", "dense", seed=9)
    return made


@pytest.fixture(scope="module")
def expected(hosts: Hosts, tiny_dense: Path, users: Users) -> Tokens:
    """The answers of one rank of stock vLLM."""
    more = (*WITH_ADAPTERS, "--served-model-name", MODEL)
    with stock_tp1(hosts[0], tiny_dense, more, DEVELOPMENT | RUNTIME_LORA) as server:
        answers = answers_while_files_change(server, Files.below(users.shared / "files"))
    assert len({str(each) for each in answers.values()}) == len(answers), "each change changes the answers"
    return answers


@pytest.fixture(scope="module")
def pair(hosts: Hosts, users: Users) -> Iterator[Server]:
    if hosts[0].namespace is None:
        pytest.skip("needs network namespaces: run as root with iproute2 installed")
    port = str(hosts[0].free_port())
    with (
        join(hosts, users, port, env=DEVELOPMENT),
        serve(hosts, users, port, *WITH_ADAPTERS, env=DEVELOPMENT) as server,
    ):
        server.wait_until_healthy()
        yield server


@pytest.fixture(scope="module")
def answers(pair: Server, expected: Tokens, users: Users) -> Tokens:
    return answers_while_files_change(pair, Files.below(users.shared / "files"))


@pytest.mark.parametrize(
    "change",
    [
        "at the start",
        "adapter",
        "adapter, loaded in place",
        "adapter, changed after it was loaded in place",
        "weights of a path",
        "pickled weights",
        "adapter, with other weights",
        "weights that were overwritten",
    ],
)
def test_both_ranks_load_what_the_leader_has(change: str, answers: Tokens, expected: Tokens) -> None:
    assert answers[change] == expected[change]
    counted = f"{sum(map(len, answers[change]))} tokens"
    record("other files on the follower", change, f"{EQUAL}: {counted}", stock=ONE_RANK)


def test_weights_that_are_nowhere_change_nothing(pair: Server, answers: Tokens, users: Users) -> None:
    """Stock vLLM has no model any more after that."""
    response = reload_weights(pair, users.shared / "none")
    assert response.status_code == 500
    assert "there is no model in" in response.text
    assert tokens_of(pair, MODEL) == answers["weights that were overwritten"]


def test_weights_that_do_not_fit_end_the_pair(pair: Server, answers: Tokens, users: Users) -> None:
    """Of another architecture: their layers are found to be unknown after others were loaded."""
    response = reload_weights(pair, users.shared / "files/damaged")
    sentence = "the weights are incomplete or not the same on both machines after reload_weights (the leader's worker"
    assert sentence in response.text
    assert pair.leader.wait(60) != 0
    assert pair.leader.output().count(f"vllm serve --spark: {sentence}") == 1


def test_weights_that_bob_lacks_are_refused_without_copying(namespaces: Hosts, users: Users) -> None:
    """In one sentence; both ranks go on with the weights that they have."""
    port = str(namespaces[0].free_port())
    with (
        join(namespaces, users, port, env=DEVELOPMENT) as follower,
        serve(namespaces, users, port, *OFF, env=DEVELOPMENT) as server,
    ):
        server.wait_until_healthy()
        before = tokens_of(server, MODEL)
        response = reload_weights(server, users.shared / "never copied")
        assert response.status_code == 500
        assert "the weights cannot be reloaded on both machines: the weight file model.safetensors has" in response.text
        assert tokens_of(server, MODEL) == before
        assert_quiet(follower)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_reload_that_fails_on_one_rank_ends_the_pair(hosts: Hosts, tiny_dense: Path, rank: int) -> None:
    """Late on the follower: the leader has the other weights by then."""
    arguments = ["--worker-extension-cls", "tests.serve.failing_extension.Failing"]
    environment = DEVELOPMENT | {"FAILING_RANKS": str(rank), "FAILING_IN": "reload_weights"}
    with spark_tp2(hosts, tiny_dense, arguments, environment) as server:
        response = reload_weights(server)
        sentence = (
            f"the weights are incomplete or not the same on both machines after reload_weights (the "
            f"{('leader', 'follower')[rank]}'s worker failed: ValueError: planted failure of rank {rank}); start the"
        )
        assert sentence in response.text
        assert server.leader.wait(60) != 0
        assert server.leader.output().count(f"vllm serve --spark: {sentence}") == 1


def assert_quiet(process: Process) -> None:
    assert "Traceback" not in process.tail(), process.tail()
