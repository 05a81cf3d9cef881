"""vLLM's development end points: sleep, calls of workers, other weights, profiles, and caches that are emptied."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve import prompts
from tests.serve.development import DEVELOPMENT, EXTENSION
from tests.serve.hosts import Hosts
from tests.serve.servers import Server
from vllm_spark.models.tiny import make_tiny_model

from .side_by_side import SideBySide, request, side_by_side

pytestmark = pytest.mark.thorough

ASKED = prompts.PROMPTS[:3]
HITS = "vllm:prefix_cache_hits_total"


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both servers write profiles, one after the other."""
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def both(hosts: Hosts, tiny_dense: Path, profiles: Path) -> Iterator[SideBySide]:
    profiler = {"profiler": "torch", "torch_profiler_dir": str(profiles)}
    arguments = (*EXTENSION, "--enable-prefix-caching", "--profiler-config", json.dumps(profiler))
    with side_by_side(hosts, tiny_dense, arguments, DEVELOPMENT) as servers:
        yield servers


def post(server: Server, path: str, **body: Any) -> tuple[int, Any]:
    """Status and JSON of the answer, or its text."""
    response = request(server, "POST", path, json=body or None)
    try:
        return response.status_code, response.json()
    except ValueError:
        return response.status_code, response.text


def call(server: Server, method: str, *args: Any, **kwargs: Any) -> Any:
    """Both ranks' results of a method of the workers."""
    status, answer = post(server, "/collective_rpc", method=method, args=args, kwargs=kwargs)
    assert status == 200, answer
    return answer["results"]


def tokens(server: Server) -> list[list[int]]:
    return prompts.greedy_tokens(server.client, ASKED, 24)


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake_up(both: SideBySide, level: int) -> None:
    """vLLM's CPU worker frees nothing; the scheduler sleeps all the same, and the calls reach both workers."""

    def ask(server: Server) -> list[Any]:
        answers: list[Any] = [tokens(server), post(server, f"/sleep?level={level}")]
        answers.append(request(server, "GET", "/is_sleeping").json())
        answers += [post(server, "/wake_up?tags=weights"), post(server, "/wake_up")]
        answers += [request(server, "GET", "/is_sleeping").json(), tokens(server)]
        return answers

    with both.same(
        "sleep and wake up", f"level {level}, with tags", ask, lambda answers: f"{len(answers)} answers"
    ) as answers:
        assert answers[2] == {"is_sleeping": True}
        assert answers[-2] == {"is_sleeping": False}
        assert answers[0] == answers[-1]


def test_calls_of_workers(both: SideBySide) -> None:
    """None that fails: stock's second host answers later calls with the error of that one."""

    def ask(server: Server) -> list[Any]:
        nothing, _ = post(server, "/collective_rpc", args=[1])
        positional, named = call(server, "sleep_on", 1, 0.0), call(server, "sleep_on", rank=0, seconds=0.0)
        return [positional, named, call(server, "check_health"), nothing]

    with both.same(
        "/collective_rpc", "methods of an extension", ask, lambda answers: f"{len(answers)} answers"
    ) as answers:
        assert answers == [[{"rank": 0}, {"rank": 1}]] * 2 + [[None, None], 400]


def test_profiles(both: SideBySide, profiles: Path) -> None:
    def ask(server: Server) -> list[Any]:
        before = set(profiles.iterdir())
        statuses = [post(server, "/start_profile")[0]]
        tokens(server)
        statuses.append(post(server, "/stop_profile")[0])
        written = [path.name for path in set(profiles.iterdir()) - before if path.name.endswith(".gz")]
        return [statuses, sorted(name.partition(".")[0] for name in written if name.startswith("rank"))]

    with both.same("profiles", "/start_profile, /stop_profile", ask, lambda answer: ", ".join(answer[1])) as (
        statuses,
        written,
    ):
        assert statuses == [200, 200]
        assert written == ["rank0", "rank1"]


def test_caches_that_are_emptied(both: SideBySide) -> None:
    prompt = "of this prompt some blocks are in the cache " * 30

    def hits(server: Server) -> int:
        before = server.metrics(HITS)[HITS][""]
        prompts.greedy_tokens(server.client, [prompt], 4)
        return int(server.metrics(HITS)[HITS][""] - before)

    def ask(server: Server) -> list[Any]:
        answers: list[Any] = [hits(server), hits(server)]
        answers += [post(server, f"/reset_{kind}_cache")[0] for kind in ("prefix", "mm", "encoder")]
        return [*answers, hits(server)]

    with both.same(
        "reset of caches", "prefix, multimodal, encoder", ask, lambda answers: f"hits {answers[0::5]} around it"
    ) as (first, second, *statuses, third):
        assert (first, third) == (0, 0)
        assert second > 0
        assert statuses == [200] * 3


def test_other_weights(both: SideBySide, tiny_dense: Path, tmp_path: Path) -> None:
    """By a path, and the first ones again; each rank has the same half of them as stock's."""
    other = make_tiny_model(tmp_path / "other", "dense", seed=1)

    def ask(server: Server) -> list[Any]:
        answers: list[Any] = [tokens(server)]
        for path in (other, tiny_dense):
            answers += [call(server, "reload_weights", weights_path=str(path)), tokens(server)]
        return [*answers, call(server, "reload_weights"), call(server, "compute_weight_checksums")]

    with both.same(
        "reload_weights",
        "a path, the first weights again",
        ask,
        lambda answers: f"{len(answers[-1][0])} checksums a rank",
    ) as (first, _, second, _, third, _, checksums):
        assert first == third != second
        assert checksums[0].keys() != checksums[1].keys()
        assert set(checksums[0].values()) != set(checksums[1].values())
