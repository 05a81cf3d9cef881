"""The leader's executor over a pair of real connections: an engine that does not come up, and calls with a time-out."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_spark.backend.status import BOARD_VARIABLE, CounterBoard
from vllm_spark.compat.patching import all_patches
from vllm_spark.config.settings import SparkConfig
from vllm_spark.executor import executor as leader
from vllm_spark.executor import leader as pair_module
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.framing import Kind, Lane
from vllm_spark.executor.executor import SparkExecutor, give_up_unfinished_start
from vllm_spark.executor.handshake.server import Follower, Listener
from vllm_spark.executor.leader import Pair
from vllm_spark.executor.rpc import LAST_CALL_OF_THE_START, RemoteError, decode_header, encode_result
from vllm_spark.kernels import runtime

from .test_channel import LIMIT, SECRET, lanes


class Worker:
    """Has one method that an executor calls, and an end."""

    def __init__(self) -> None:
        self.ended = 0

    def compile_or_warm_up_model(self) -> None: ...

    def rank(self) -> int:
        return 0

    def shutdown(self) -> None:
        self.ended += 1


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> SparkExecutor:
    """With a pair on real sockets, up to the point where vLLM goes on by itself."""
    (control, _), (calls, far_calls), (groups, _far_groups) = lanes(), lanes(), lanes()
    listener = Listener("127.0.0.1", 0, tls_context(SECRET, "leader"), LIMIT)
    pair = Pair(SparkConfig(), listener, Follower("the follower", control, calls, groups), CounterBoard(None))

    def load(self: Any) -> None:
        self._pair, self.driver_worker = pair, Worker()

    monkeypatch.setattr(SparkExecutor, "_start", load)
    monkeypatch.setattr(runtime, "_served", None)
    monkeypatch.setenv(BOARD_VARIABLE, "")
    made: SparkExecutor = object.__new__(SparkExecutor)
    made.vllm_config = SimpleNamespace()
    made.far_calls = far_calls  # the follower's end
    made._init_executor()
    return made


def held_by(executor: Any) -> tuple[Pair, Worker]:
    return executor._pair, executor.driver_worker


def test_the_next_engine_gives_up_one_that_did_not_come_up(executor: SparkExecutor) -> None:
    """Also one without a pair, before its configuration is made: the port is looked at there."""
    pair, worker = held_by(executor)
    runtime._served = executor.vllm_config
    found: list[tuple[bool, bool]] = []

    def create(engine_args: Any) -> str:
        found.append((pair.closing, runtime.is_active()))
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


def call_on(follower: Lane) -> int:
    """Takes the next call there, and returns its number."""
    return decode_header(follower.expect(Kind.QUERY, timeout=20).payload).number


def test_a_call_that_times_out_leaves_the_pair_at_work(executor: Any) -> None:
    """Its answer comes later, is not taken for another call's, and is not waited for."""
    pair, _ = held_by(executor)
    executor._random_state, executor._started = nullcontext(), True
    follower: Lane = executor.far_calls
    with pytest.raises(TimeoutError, match=r"^the call of rank timed out after 0\.05 s: the follower did not"):
        executor.collective_rpc("rank", timeout=0.05)
    with pytest.raises(TimeoutError):
        executor.collective_rpc("rank", timeout=0)
    assert not pair.failed
    late = [call_on(follower), call_on(follower)]
    for number in late:
        follower.send(Kind.REPLY, encode_result(-1, number))

    def answer() -> None:
        follower.send(Kind.REPLY, encode_result(1, call_on(follower)))

    answering = threading.Thread(target=answer)
    answering.start()
    assert executor.collective_rpc("rank", timeout=20) == [0, 1]
    answering.join(20)
    assert not pair.failed
    executor.shutdown()


def test_a_call_that_timed_out_and_failed_then_is_no_failure_of_the_next(
    executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The follower's heartbeat tells of it while the leader waits for the next call's answer."""
    monkeypatch.setattr(pair_module, "_SETTLE_TIMEOUT", 0.0)
    pair, _ = held_by(executor)
    executor._random_state, executor._started = nullcontext(), True
    with pytest.raises(TimeoutError):
        executor.collective_rpc("rank", timeout=0)
    pair.ask("rank", (), {})
    report = {"counters": {"rank": 1}, "failed_call": "its worker failed in 'rank': ValueError: 7"}
    pair._take_report(report | {"failed_number": call_on(executor.far_calls)})
    assert not pair.failed
    pair._take_report(report | {"failed_number": call_on(executor.far_calls)})
    with pytest.raises(RemoteError, match=r"its worker failed in 'rank': ValueError: 7$"):
        pair.check()
    executor.shutdown()


@pytest.mark.parametrize(("error", "in_order"), [(None, True), (SystemExit(0), True), (RuntimeError("a bug"), False)])
def test_a_stop_is_told_from_an_error_of_vllm(
    executor: SparkExecutor, error: BaseException | None, in_order: bool
) -> None:
    """As vLLM's engine does, which ends its executor while it leaves its loop."""
    board = executor._board = CounterBoard.create()
    board.begin_work()

    def run_engine() -> None:
        try:
            if error is not None:
                raise error
        finally:
            executor.shutdown()

    with nullcontext() if error is None else pytest.raises(type(error)):
        run_engine()
    assert board.ended_in_order() is in_order
    assert board.death() is None
