"""The leader's executor over a pair of real connections: an engine that does not come up, and calls with a time-out."""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.request import LoRARequest
from vllm.v1.worker.worker_base import WorkerWrapperBase

from vllm_spark.backend.status import STATUS_VARIABLE, EngineStatus, RankCounters
from vllm_spark.compat.patching import all_patches
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import RefusedError, SparkError
from vllm_spark.executor import leader_executor, leader_session
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.framing import Connection, Kind
from vllm_spark.executor.handshake.messages import Reason, decode_frame
from vllm_spark.executor.handshake.server import Follower, Listener
from vllm_spark.executor.heartbeat import FollowerReport
from vllm_spark.executor.leader_executor import SparkExecutor, abandon_unfinished_start
from vllm_spark.executor.leader_session import LeaderSession
from vllm_spark.executor.model_files.adapters import LeaderAdapters
from vllm_spark.executor.rpc import WARM_UP, RemoteError, decode_header, encode_error, encode_result
from vllm_spark.kernels import runtime as serving

from .test_channel import LIMIT, SECRET, connections


class Worker:
    """Has a few methods that an executor calls, and an end."""

    def __init__(self) -> None:
        self.ended = 0
        self.weights_error: Exception | None = None
        self.model_runner = self

    def reload_weights(self, weights_iterator: Any = None, weights_path: str | None = None) -> None:
        self.update_weights({})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if self.weights_error is not None:
            raise self.weights_error

    def compile_or_warm_up_model(self) -> None: ...

    def rank(self) -> int:
        return 0

    def execute_model(self, output: Any) -> None:
        if output.interrupted:
            raise KeyboardInterrupt

    def list_loras(self) -> set[int]:
        return set()

    def shutdown(self) -> None:
        self.ended += 1


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> SparkExecutor:
    """With a pair on real sockets, up to the point where vLLM goes on by itself."""
    (control, far_control), (calls, far_calls), (groups, far_groups) = connections(), connections(), connections()
    listener = Listener("127.0.0.1", 0, tls_context(SECRET, "leader"), LIMIT)
    session = LeaderSession(
        SparkConfig(), listener, Follower("the follower", control, calls, groups), EngineStatus(None)
    )

    def load(self: Any) -> None:
        self._session, self.driver_worker = session, Worker()

    monkeypatch.setattr(SparkExecutor, "_start", load)
    monkeypatch.setattr(serving, "_active", None)
    monkeypatch.setenv(STATUS_VARIABLE, "")
    made: SparkExecutor = object.__new__(SparkExecutor)
    made.vllm_config = SimpleNamespace()
    made.far_calls, made.far_control, made.far_groups = far_calls, far_control, far_groups  # the follower's ends
    made._init_executor()
    return made


def held_by(executor: Any) -> tuple[LeaderSession, Worker]:
    return executor._session, executor.driver_worker


def test_the_next_engine_gives_up_one_that_did_not_come_up(executor: SparkExecutor) -> None:
    """Also one without a session, before its configuration is made: the port is looked at there."""
    session, worker = held_by(executor)
    serving._active = executor.vllm_config
    found: list[tuple[bool, bool]] = []

    def create(engine_args: Any) -> str:
        found.append((session.closing, serving.is_active()))
        return "made"

    patch = next(each for each in all_patches() if each.name == "executor-choice")
    configure = patch.replace(create)
    assert configure(SimpleNamespace(additional_config=None)) == "made"
    assert found == [(True, False)]
    assert worker.ended == 1
    assert executor.driver_worker is None
    abandon_unfinished_start()
    assert worker.ended == 1


def test_an_executor_gives_up_the_one_before(executor: SparkExecutor) -> None:
    session, worker = held_by(executor)
    successor: SparkExecutor = object.__new__(SparkExecutor)
    successor.vllm_config = SimpleNamespace()
    successor._init_executor()
    assert session.closing
    assert worker.ended == 1
    successor.shutdown()


def test_an_engine_that_is_up_is_left_alone(executor: SparkExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    session, worker = held_by(executor)
    monkeypatch.setattr(SparkExecutor, "_run", lambda *args: [None, None])
    executor.collective_rpc("get_kv_cache_spec")
    executor.collective_rpc(WARM_UP)
    abandon_unfinished_start()
    assert not session.closing
    assert worker.ended == 0
    executor.shutdown()
    assert (session.closing, worker.ended) == (True, 1)


def test_nothing_of_an_ended_engine_is_kept(executor: SparkExecutor) -> None:
    executor.shutdown()
    assert leader_executor._unfinished is None


def test_a_guard_that_is_late_does_not_end_the_process(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had read the memory before the shutdown stopped it."""
    session, _ = held_by(executor)
    executor.shutdown()
    executor._in_engine_process = True
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    executor._memory_exhausted(SparkError("the memory runs out"))
    assert (ended, session.failed) == ([], False)


def call_on(follower: Connection) -> int:
    """Takes the next call there, and returns its number."""
    return decode_header(follower.expect(Kind.QUERY, timeout=20).payload).number


def test_a_call_that_times_out_leaves_the_pair_at_work(executor: Any) -> None:
    """Its answer comes later, is not taken for another call's, and is not waited for."""
    session, _ = held_by(executor)
    executor._random_state, executor._started = nullcontext(), True
    follower: Connection = executor.far_calls
    with pytest.raises(TimeoutError, match=r"^the call of rank timed out after 0\.05 s: the follower did not"):
        executor.collective_rpc("rank", timeout=0.05)
    with pytest.raises(TimeoutError):
        executor.collective_rpc("rank", timeout=0)
    assert not session.failed
    late = [call_on(follower), call_on(follower)]
    for number in late:
        follower.send(Kind.REPLY, encode_result(-1, number))

    def answer() -> None:
        follower.send(Kind.REPLY, encode_result(1, call_on(follower)))

    answering = threading.Thread(target=answer)
    answering.start()
    assert executor.collective_rpc("rank", timeout=20) == [0, 1]
    answering.join(20)
    assert not session.failed
    executor.shutdown()


BROKEN = ValueError("no room")
WEIGHTS_DIFFER = (
    r"^the weights are incomplete or not the same on both machines after {} \({}ValueError: no room\); start"
)


@pytest.mark.parametrize(
    ("method", "on_leader", "on_follower", "sentence"),
    [
        ("update_weights", None, BROKEN, WEIGHTS_DIFFER.format("update_weights", "the follower's worker failed: ")),
        ("update_weights", BROKEN, None, WEIGHTS_DIFFER.format("update_weights", "the leader's worker failed: ")),
        ("update_weights", BROKEN, BROKEN, None),
        ("reload_weights", None, BROKEN, WEIGHTS_DIFFER.format("reload_weights", "the follower's worker failed: ")),
        ("reload_weights", BROKEN, BROKEN, WEIGHTS_DIFFER.format("reload_weights", "the leader's worker failed: ")),
    ],
)
def test_ranks_that_may_have_different_weights_do_not_go_on(
    executor: Any, method: str, on_leader: Exception | None, on_follower: Exception | None, sentence: str | None
) -> None:
    """Both have failed in `update_weights` as in stock vLLM; a failed `reload_weights` leaves no model there either.

    A time-out does not count: whoever does not wait does not learn that one rank has failed.
    """
    session, worker = held_by(executor)
    executor._random_state, executor._started = nullcontext(), True
    worker.weights_error = on_leader

    def answer() -> None:
        number = call_on(executor.far_calls)
        reply = encode_result(None, number) if on_follower is None else encode_error(on_follower, number)
        executor.far_calls.send(Kind.REPLY, reply)

    answering = threading.Timer(0.2, answer)
    answering.start()
    error, expected = (ValueError, "no room") if sentence is None else (SparkError, sentence)
    with pytest.raises(error, match=expected):
        executor.collective_rpc(method, timeout=0.05, args=([],))
    answering.join(20)
    assert session.failed == (sentence is not None)
    executor.shutdown()


def test_a_call_that_timed_out_and_failed_then_is_no_failure_of_the_next(
    executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The follower's heartbeat tells of it while the leader waits for the next call's answer."""
    monkeypatch.setattr(leader_session, "_REPLY_TIMEOUT_AFTER_ERROR", 0.0)
    session, _ = held_by(executor)
    executor._random_state, executor._started = nullcontext(), True
    with pytest.raises(TimeoutError):
        executor.collective_rpc("rank", timeout=0)
    session.ask("rank", (), {})

    def report() -> FollowerReport:
        number = call_on(executor.far_calls)
        return FollowerReport(RankCounters(1), "its worker failed in 'rank': ValueError: 7", number)

    session._take_report(report())
    assert not session.failed
    session._take_report(report())
    with pytest.raises(RemoteError, match=r"its worker failed in 'rank': ValueError: 7$"):
        session.check()
    executor.shutdown()


@pytest.mark.parametrize(("error", "in_order"), [(None, True), (SystemExit(0), True), (RuntimeError("a bug"), False)])
def test_a_stop_is_told_from_an_error_of_vllm(
    executor: SparkExecutor, error: BaseException | None, in_order: bool
) -> None:
    """As vLLM's engine does, which ends its executor while it leaves its loop."""
    status = executor._status = EngineStatus.create()
    status.mark_started()

    def run_engine() -> None:
        try:
            if error is not None:
                raise error
        finally:
            executor.shutdown()

    with nullcontext() if error is None else pytest.raises(type(error)):
        run_engine()
    assert status.ended_on_request() is in_order
    assert status.death() is None


def step_of(*requests: Any, interrupted: bool = False) -> Any:
    """As much of a scheduler's output as an executor looks at. Pickled with each call."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(lora_request=request) for request in requests],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=()),
        has_structured_output_requests=False,
        interrupted=interrupted,
    )


@pytest.fixture
def serving_adapters(executor: Any) -> Any:
    """The same executor, up, of a model that is served with adapters."""
    executor._random_state, executor._started = nullcontext(), True
    executor._adapters = LeaderAdapters(executor._compare_files, executor._loaded_adapters, executor._load_adapter)
    yield executor
    executor.shutdown()


def test_a_step_whose_adapter_is_gone_ends_the_pair(serving_adapters: Any, tmp_path: Path) -> None:
    """Its other requests are under way: it can neither be refused nor be run without it."""
    session, _ = held_by(serving_adapters)
    request = LoRARequest("sql", 1, str(tmp_path / "gone"))
    with pytest.raises(SparkError) as caught:
        serving_adapters.collective_rpc("execute_model", args=(step_of(request),))
    assert session.failed
    assert str(caught.value).startswith("the adapters of a step cannot be compared with the follower's: LoRAAdapterNot")
    assert isinstance(caught.value.__cause__, LoRAAdapterNotFoundError)


def test_the_same_adapter_in_a_call_is_an_error_of_that_call(serving_adapters: Any, tmp_path: Path) -> None:
    session, _ = held_by(serving_adapters)
    with pytest.raises(LoRAAdapterNotFoundError):
        serving_adapters.collective_rpc("add_lora", args=(LoRARequest("sql", 1, str(tmp_path / "gone")),))
    assert not session.failed


def adapter(folder: Path) -> LoRARequest:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return LoRARequest("sql", 1, str(folder))


def test_a_follower_that_does_not_compare_is_not_waited_for_for_ever(
    serving_adapters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader_executor, "_COMPARE_TIMEOUT", 0.1)
    session, _ = held_by(serving_adapters)
    with pytest.raises(
        RefusedError, match=r"^the adapter sql cannot .*: the follower has not answered for 0\.1 s; see"
    ):
        serving_adapters.collective_rpc("add_lora", args=(adapter(tmp_path / "sql"),))
    assert not session.failed


def test_a_call_that_never_comes_back_ends_the_next_step(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up by its caller, not run by the follower: the step behind it is not waited for for ever."""
    monkeypatch.setattr(leader_session, "_DRAIN_TIMEOUT", 0.1)
    session, _ = held_by(executor)
    executor._random_state, executor._started = nullcontext(), True
    with pytest.raises(TimeoutError):
        executor.collective_rpc("rank", timeout=0)
    with pytest.raises(SparkError, match=r"^the follower has not finished a call that timed out, 0\.1 s"):
        executor.collective_rpc("execute_model", args=(step_of(),))
    assert session.failed
    executor.shutdown()


def test_an_interrupted_step_ends_the_pair(executor: Any) -> None:
    """In the user's own process, which may go on: the follower has done the step."""
    session, _ = held_by(executor)
    executor._random_state, executor._started = nullcontext(), True
    with pytest.raises(KeyboardInterrupt):
        executor.collective_rpc("execute_model", args=(step_of(interrupted=True),))
    with pytest.raises(
        SparkError, match=r"^the leader was interrupted in a step \(KeyboardInterrupt\); make a new eng"
    ):
        executor.collective_rpc("execute_model", args=(step_of(),))
    assert session.failed
    executor.shutdown()


def test_an_interrupted_wait_for_an_answer_ends_the_pair(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step fetches the answer of a call that was given up: header and payload are not read on as another one."""
    session, _ = held_by(executor)
    executor._random_state, executor._started = nullcontext(), True
    with pytest.raises(TimeoutError):
        executor.collective_rpc("rank", timeout=0)
    executor.far_calls.send(Kind.REPLY, encode_result(1, call_on(executor.far_calls)))
    read, interrupts = Connection._read, iter([False, True])

    def interrupted(connection: Connection, *given: Any) -> bytes:
        if connection is session._follower.rpc and next(interrupts):
            raise SystemExit
        return read(connection, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Connection, "_read", interrupted)
        with pytest.raises(SystemExit):
            executor.collective_rpc("execute_model", args=(step_of(),))
    assert session.failed
    with pytest.raises(SparkError, match=r"^the leader was interrupted in a step \(SystemExit\); make a new engine$"):
        executor.collective_rpc("rank")
    executor.shutdown()


def test_a_worker_that_could_not_be_made_is_passed_over(executor: Any) -> None:
    """Its wrapper has no worker: `shutdown` of vLLM's recurses, and the groups stayed open."""
    executor.driver_worker = WorkerWrapperBase(rpc_rank=0)
    executor.shutdown()
    assert executor.driver_worker is None


class Ended(BaseException):
    """In place of the end of this process."""


def test_the_follower_is_told_why_an_engine_does_not_start(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine with a process of its own, which ends at once."""

    def end(code: int) -> None:
        raise Ended(code)

    session, _ = held_by(executor)
    executor._in_engine_process = True
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(leader_executor, "_end_process_soon", lambda *given: None)
    session._heartbeat.start()
    with pytest.raises(Ended):
        executor._abandon_start(ValueError("no room for the cache"))
    while (frame := executor.far_control.receive(timeout=20)).kind is Kind.HEARTBEAT:
        pass
    assert frame.kind is Kind.LEAVE
    assert decode_frame(frame, Reason).sentence == (
        "its engine does not start: the leader's worker failed: ValueError: no room for the cache"
    )
    session.close("the test is over")
    executor._in_engine_process = False
    executor.shutdown()


@pytest.mark.parametrize("error", [ValueError("no such scheduler"), KeyboardInterrupt()])
def test_an_engine_that_fails_after_its_last_call_ends_its_pair(
    executor: SparkExecutor, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """While it makes its scheduler: nobody calls the executor any more, and the next engine needs its port."""
    session, worker = held_by(executor)
    monkeypatch.setattr(SparkExecutor, "_run", lambda *args: [None, None])

    def start(core: Any) -> None:
        core.model_executor = executor
        executor.collective_rpc(WARM_UP)
        raise error

    patch = next(each for each in all_patches() if each.anchor.symbol == "vllm.v1.engine.core:EngineCore.__init__")
    with pytest.raises(type(error)):
        patch.replace(start)(SimpleNamespace())
    assert session.closing
    assert (executor.driver_worker, worker.ended) == (None, 1)


def test_an_engine_that_came_up_is_left_alone_by_its_start(
    executor: SparkExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, worker = held_by(executor)
    patch = next(each for each in all_patches() if each.anchor.symbol == "vllm.v1.engine.core:EngineCore.__init__")
    patch.replace(lambda core: setattr(core, "model_executor", executor))(SimpleNamespace())
    assert not session.closing
    assert worker.ended == 0
    executor.shutdown()
