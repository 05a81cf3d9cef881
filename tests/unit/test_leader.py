"""An engine in the user's own process that fails while it comes up, outside of every call to its executor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_spark.config import SparkConfig
from vllm_spark.counter_board import CounterBoard
from vllm_spark.executor import leader
from vllm_spark.executor.calls import LAST_CALL_OF_THE_START
from vllm_spark.executor.credentials import tls_context
from vllm_spark.executor.leader import SparkExecutor, give_up_unfinished_start
from vllm_spark.executor.listener import Follower, Listener
from vllm_spark.executor.pair import Pair
from vllm_spark.patches import all_patches
from vllm_spark.tuning import serving

from .test_channel import LIMIT, SECRET
from .test_pair import near_lanes


class Worker:
    """Has one method that an executor calls, and an end."""

    def __init__(self) -> None:
        self.ended = 0

    def compile_or_warm_up_model(self) -> None: ...

    def shutdown(self) -> None:
        self.ended += 1


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> SparkExecutor:
    """With a pair on real sockets, up to the point where vLLM goes on by itself."""
    listener = Listener("127.0.0.1", 0, tls_context(SECRET, "leader"), LIMIT)
    pair = Pair(SparkConfig(), listener, Follower("the follower", *near_lanes()), CounterBoard(None))

    def load(self: Any) -> None:
        self._pair, self.driver_worker = pair, Worker()

    monkeypatch.setattr(SparkExecutor, "_start", load)
    monkeypatch.setattr(serving, "_served", None)
    made: SparkExecutor = object.__new__(SparkExecutor)
    made.vllm_config = SimpleNamespace()
    made._init_executor()
    return made


def held_by(executor: Any) -> tuple[Pair, Worker]:
    return executor._pair, executor.driver_worker


def test_the_next_engine_gives_up_one_that_did_not_come_up(executor: SparkExecutor) -> None:
    """Also one without a pair, before its configuration is made: the port is looked at there."""
    pair, worker = held_by(executor)
    serving._served = executor.vllm_config
    found: list[tuple[bool, bool]] = []

    def create(engine_args: Any) -> str:
        found.append((pair.closing, serving.is_active()))
        return "made"

    patch = next(each for each in all_patches() if each.name == "executor-choice")
    configure = patch.replace(create)
    assert configure(SimpleNamespace(additional_config=None)) == "made"
    assert found == [(True, False)]
    assert worker.ended == 1
    assert executor.driver_worker is None
    give_up_unfinished_start()
    assert worker.ended == 1


def test_an_executor_gives_up_the_one_before(executor: SparkExecutor) -> None:
    pair, worker = held_by(executor)
    successor: SparkExecutor = object.__new__(SparkExecutor)
    successor.vllm_config = SimpleNamespace()
    successor._init_executor()
    assert pair.closing
    assert worker.ended == 1
    successor.shutdown()


def test_an_engine_that_is_up_is_left_alone(executor: SparkExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, worker = held_by(executor)
    monkeypatch.setattr(SparkExecutor, "_run", lambda *args: [None, None])
    executor.collective_rpc("get_kv_cache_spec")
    executor.collective_rpc(LAST_CALL_OF_THE_START)
    give_up_unfinished_start()
    assert not pair.closing
    assert worker.ended == 0
    executor.shutdown()
    assert (pair.closing, worker.ended) == (True, 1)


def test_nothing_of_an_ended_engine_is_kept(executor: SparkExecutor) -> None:
    executor.shutdown()
    assert leader._unfinished is None
