"""What one rank records: the functions that are replaced meanwhile, its end, and the kernels of torch's events."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_spark.collective import RuntimeRecords
from vllm_spark.executor.tracing.leader import LeaderTrace
from vllm_spark.executor.tracing.worker import worker_functions
from vllm_spark.recording import parts
from vllm_spark.recording.clock_offset import ClockOffset
from vllm_spark.recording.kernels import kernels_of, unix_minus_monotonic
from vllm_spark.recording.probes import Probes
from vllm_spark.recording.recorder import Recorder
from vllm_spark.recording.records import TraceAnswer, TraceRequest
from vllm_spark.recording.span_log import SpanLog
from vllm_spark.records import from_json, to_json


class Engine:
    """Has steps as vLLM's engine has."""

    def __init__(self) -> None:
        self.ran = 0

    def loop(self, output: Any) -> None:
        self.step(output)

    def step(self, output: Any) -> int:
        self.ran += 1
        return self.ran


class Runtime:
    """Stands for the collectives, which have tests of their own."""

    recording = False

    def start_recording(self, capacity: int) -> None:
        self.recording = True

    def stop_recording(self) -> RuntimeRecords:
        self.recording = False
        return RuntimeRecords([], [], 0)


def scheduled(*counts: int, new: bool = False, drafts: int = 0) -> Any:
    """vLLM's SchedulerOutput, as far as it is read, with a prompt that must not be kept."""
    names = [f"request-{index}" for index in range(len(counts))]
    return SimpleNamespace(
        scheduled_new_reqs=["the prompt"] if new else [],
        num_scheduled_tokens=dict(zip(names, counts, strict=True)),
        scheduled_spec_decode_tokens={name: [0] * drafts for name in names} if drafts else {},
        total_num_scheduled_tokens=sum(counts),
    )


def started(engine: Engine, request: TraceRequest) -> tuple[Recorder, Runtime]:
    runtime: Any = Runtime()
    recorder = Recorder(0, "desk1", request, runtime)
    recorder.start([(Engine, "loop", parts.LOOP), (engine, "step", parts.WORKER)], (engine, "step", lambda each: each))
    return recorder, runtime


def test_it_ends_by_itself_and_leaves_nothing() -> None:
    engine = Engine()
    loop = vars(Engine)["loop"]
    recorder, runtime = started(engine, TraceRequest("start", steps=3, sequences=2, seconds=60))
    assert vars(Engine)["loop"] is not loop
    engine.loop(scheduled(7, 5, new=True))
    engine.loop(scheduled(1))
    engine.loop(scheduled())  # the end of a request, and nothing to compute
    for _ in range(3):
        engine.loop(scheduled(1, 1))
        assert recorder.running
    engine.loop(scheduled(3, 3, drafts=2))
    assert not recorder.running
    assert vars(Engine)["loop"] is loop
    assert "step" not in vars(engine)
    engine.loop(scheduled(1, 1))
    assert engine.ran == 8
    assert runtime.recording, "until its records are taken: the last step has some"
    result = recorder.result()
    assert not runtime.recording
    assert [step[1:] for step in result.steps] == [
        (False, 2, 12),
        (True, 1, 1),
        *[(True, 2, 2)] * 3,
        (True, 2, 6),
    ]
    names = [result.parts[span.part] for span in result.spans]
    assert names == [parts.WORKER, parts.LOOP] * 7
    assert "prompt" not in to_json(result).decode()
    assert "request-" not in to_json(result).decode()


def test_it_ends_after_its_time() -> None:
    engine = Engine()
    recorder, _ = started(engine, TraceRequest("start", steps=3, seconds=0.05))
    engine.loop(scheduled(1))
    time.sleep(0.06)
    engine.loop(scheduled(1))
    assert "step" not in vars(engine)
    assert len(recorder.result().steps) == 2


def test_a_start_that_fails_leaves_nothing() -> None:
    class Fixed:
        __slots__ = ()

        def step(self, output: Any) -> int:
            return 0

    engine, runtime = Engine(), Runtime()
    loop = vars(Engine)["loop"]
    given: Any = runtime
    recorder = Recorder(0, "desk1", TraceRequest("start"), given)
    functions = [(Engine, "loop", parts.LOOP), (Fixed(), "step", parts.WORKER)]
    with pytest.raises(TypeError):
        recorder.start(functions, (engine, "step", lambda each: each))
    assert vars(Engine)["loop"] is loop
    assert not recorder.running
    assert not runtime.recording


def test_an_error_of_a_step_is_a_span_and_passes() -> None:
    log = SpanLog(10)

    @log.timed(parts.FORWARD)
    def fails() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        fails()
    assert [parts.HOST_PARTS[span.part] for span in log.spans] == [parts.FORWARD]


def test_scopes_of_vllm() -> None:
    """Those of its model runner; another is none, because the scheduler's are within a part."""
    log = SpanLog(3)
    names = ["preprocess", "forward", "ModelRunnerOutput"]
    with log.scope("schedule: allocate_slots"):
        for name in names:
            with log.scope(f"gpu_model_runner: {name}"):
                pass
    assert [parts.HOST_PARTS[span.part] for span in log.spans] == [parts.PREPARE, parts.FORWARD, parts.OUTPUT]
    with log.scope("gpu_model_runner: eplb"):
        pass
    assert (len(log.spans), log.lost) == (3, 1)


def test_replaced_functions_are_put_back_in_any_case() -> None:
    class Base:
        def one(self) -> int:
            return 1

    class Derived(Base): ...

    thing = Derived()
    probes = Probes()
    assert probes.replace(Derived, "one", lambda old: lambda self: old(self) + 1)
    assert probes.replace(thing, "one", lambda old: lambda: old() * 10)
    assert probes.replace(thing, "one", lambda old: lambda: old() * 10)
    assert not probes.replace(thing, "two", lambda old: old)
    assert thing.one() == 200
    probes.restore()
    assert thing.one() == 1
    assert "one" not in vars(thing)
    assert "one" not in vars(Derived)


def test_what_something_else_has_replaced_since_stays() -> None:
    thing = SimpleNamespace(one=1)
    probes = Probes()
    probes.replace(thing, "one", lambda old: old + 1)
    thing.one = 7
    probes.restore()
    assert thing.one == 7


def test_the_model_runner_without_scopes_is_timed_by_its_functions() -> None:
    runner = type("GPUModelRunner", (), {"__module__": "vllm.v1.worker.gpu.model_runner", "model": None})()
    worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
    assert {part for _, _, part in worker_functions(worker)} == {
        *(parts.PREPARE, parts.FORWARD, parts.HEAD, parts.SAMPLE, parts.OUTPUT)
    }
    assert worker_functions(SimpleNamespace(model_runner=Engine())) == []
    assert worker_functions(None) == []


class Event:
    """One of torch's profiler."""

    def __init__(self, name: str, device: int, start: int, duration: int, correlation: int) -> None:
        self._values = (name, device, start, duration, correlation)

    def name(self) -> str:
        return self._values[0]

    def device_type(self) -> int:
        return self._values[1]

    def device_resource_id(self) -> int:
        return 7

    def start_ns(self) -> int:
        return self._values[2]

    def duration_ns(self) -> int:
        return self._values[3]

    def correlation_id(self) -> int:
        return self._values[4]


def test_kernels_have_the_launch_of_their_graph() -> None:
    offset = 1_000_000
    events = [
        Event("cudaGraphLaunch", 0, offset + 100, 20, 5),
        Event("b", 1, offset + 400, 30, 5),
        Event("a", 1, offset + 300, 50, 5),
        Event("a", 1, offset + 900, 50, 6),
    ]
    names, kernels = kernels_of(events, offset)
    assert [(names[kernel.name], *kernel[1:]) for kernel in kernels] == [
        ("a", 7, 300, 350, 100),
        ("b", 7, 400, 430, 100),
        ("a", 7, 900, 950, 0),
    ]


def test_the_clock_of_torchs_events() -> None:
    assert abs(time.monotonic_ns() + unix_minus_monotonic() - time.time_ns()) < 50_000_000


class Session:
    """Stands for the leader's side of a session."""

    def __init__(self) -> None:
        self.runtime = Runtime()


@pytest.mark.parametrize(
    ("permitted", "request_", "refusal"),
    [
        (False, TraceRequest("start"), "this server does not permit traces; start vllm serve with --spark-trace on"),
        (False, TraceRequest("collect"), "this server does not permit traces; start vllm serve with --spark-trace on"),
        (True, TraceRequest("collect"), "no trace was started"),
        (True, TraceRequest("start", steps=0), "0 steps are invalid: must be 1 to 1000"),
        (True, TraceRequest("start", sequences=10**9), "1000000000 sequences are invalid: must be 1 to 4096"),
        (True, TraceRequest("start", seconds=-1), "-1 seconds are invalid: must be more than 0, and at most 3600"),
    ],
)
def test_what_the_leader_refuses(permitted: bool, request_: TraceRequest, refusal: str) -> None:
    session: Any = Session()
    trace = LeaderTrace(permitted, session, object)
    answer = from_json(trace.answer(to_json(request_).decode(), None), TraceAnswer)
    assert answer == TraceAnswer(None, refusal)


@pytest.mark.parametrize("payload", ["", "[]", "{}", '{"action": "other"}', '{"action": "start", "steps": "5"}'])
def test_what_is_no_request_is_refused(payload: str) -> None:
    session: Any = Session()
    answer = from_json(LeaderTrace(True, session, object).answer(payload, None), TraceAnswer)
    assert answer.refusal.startswith("the request is invalid: ")


def test_only_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    session: Any = Session()
    trace = LeaderTrace(True, session, object)
    trace._recorder, _ = started(Engine(), TraceRequest("start", seconds=60))
    with contextlib.closing(SimpleNamespace(close=trace._recorder.stop)):
        answer = from_json(trace.answer(to_json(TraceRequest("start")).decode(), None), TraceAnswer)
        assert answer.refusal == "another trace is being recorded; wait for its end, and try again"


def test_an_error_of_the_leaders_profiler_is_told() -> None:
    def fail() -> None:
        raise RuntimeError("another profiler is active")

    session: Any = Session()
    trace = LeaderTrace(True, session, object)
    recorder: Any = SimpleNamespace(result=fail, running=False)
    trace._recorder, trace._before = recorder, ClockOffset(0, 0, 0, 1)
    answer = from_json(trace.answer(to_json(TraceRequest("collect")).decode(), None), TraceAnswer)
    assert answer.refusal.startswith("the leader cannot record: ")
    assert "another profiler is active" in answer.refusal
    answer = from_json(trace.answer(to_json(TraceRequest("collect")).decode(), None), TraceAnswer)
    assert answer.refusal == "no trace was started"
