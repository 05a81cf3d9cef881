"""The leader's part of a trace: answers clients, and asks the follower."""

from __future__ import annotations

import logging
from typing import Any

from vllm_spark.config.settings import serve_flag
from vllm_spark.errors import SparkError, described
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.leader_session import LeaderSession
from vllm_spark.executor.rpc import EXECUTE, TRACE_RESULT, TRACE_START, RemoteError
from vllm_spark.executor.tracing.worker import worker_functions
from vllm_spark.ranks import LEADER_RANK
from vllm_spark.recording import parts
from vllm_spark.recording.clock_offset import ClockOffset, estimate
from vllm_spark.recording.recorder import Recorder
from vllm_spark.recording.records import PairRecording, RankRecording, TraceAnswer, TraceRequest
from vllm_spark.records import RecordError, from_json, to_json

logger = logging.getLogger("vllm_spark")

_ROUND_TRIPS = 400  # some 20 ms
_SECONDS = 60.0  # for the follower to start, or to send what it recorded


class LeaderTrace:
    """The recordings of one pair, on the leader.

    Args:
        permitted: the setting.
        session: with the follower.
        future: the class whose `result` waits for a step's tokens.
    """

    def __init__(self, permitted: bool, session: LeaderSession, future: type) -> None:
        self._permitted, self._session, self._future = permitted, session, future
        self._recorder: Recorder | None = None
        self._before: ClockOffset | None = None

    def answer(self, payload: str, executor: Any) -> str:
        """The JSON of a `TraceAnswer` to the JSON of a `TraceRequest`.

        Args:
            payload: from a client.
            executor: the leader's, whose steps are recorded.

        Raises:
            SparkError: the session failed.
        """
        try:
            answer = self._answered(from_json(payload, TraceRequest), executor)
        except RecordError as error:
            answer = TraceAnswer(refusal=f"the request is invalid: {error}")
        except (RemoteError, TimeoutError) as error:
            self._drop()
            answer = TraceAnswer(refusal=f"the follower cannot record: {described(error)}; see its log")
        except SparkError:
            raise
        except Exception as error:  # such as torch's, if another profiler uses the GPU
            logger.exception("A trace failed.")
            self._drop()
            answer = TraceAnswer(refusal=f"the leader cannot record: {described(error)}; see its log")
        return to_json(answer).decode()

    def _answered(self, request: TraceRequest, executor: Any) -> TraceAnswer:
        if not self._permitted:
            return TraceAnswer(
                refusal=f"this server does not permit traces; start vllm serve with {serve_flag('trace')} on"
            )
        if problem := request.problem():
            return TraceAnswer(refusal=problem)
        if request.action == "start":
            if self._recorder is not None and self._recorder.running:
                return TraceAnswer(refusal="another trace is being recorded; wait for its end, and try again")
            self._start(request, executor)
            return TraceAnswer()
        if self._recorder is None or self._before is None:
            return TraceAnswer(refusal="no trace was started")
        return TraceAnswer(self._collected(self._recorder, self._before))

    def _start(self, request: TraceRequest, executor: Any) -> None:
        self._drop()
        self._before = estimate(self._session.compare_clocks(_ROUND_TRIPS))
        self._ask(TRACE_START, request)
        self._recorder = Recorder(LEADER_RANK, host_name(), request, self._session.runtime)
        self._recorder.start(
            [
                *_engine_functions(),
                (executor, "_step", parts.WORKER),
                (executor, "_announce_step", parts.SEND),
                (self._future, "result", parts.WAIT_DEVICE),
                *worker_functions(executor.driver_worker),
            ],
            (executor, "_step", _output_of_step),
        )

    def _collected(self, recorder: Recorder, before: ClockOffset) -> PairRecording:
        self._recorder = None
        mine = recorder.result()
        theirs = from_json(self._ask(TRACE_RESULT), RankRecording)
        return PairRecording([mine, theirs], [before, estimate(self._session.compare_clocks(_ROUND_TRIPS))])

    def _drop(self) -> None:
        """Ends what an earlier client has started and not collected."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.result()

    def _ask(self, method: str, *args: Any) -> Any:
        self._session.ask(method, args, {})
        return self._session.answer(_SECONDS)


def _engine_functions() -> list[tuple[Any, str, str]]:
    """What vLLM's engine calls in its loop."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCoreProc

    return [
        (EngineCoreProc, "_process_input_queue", parts.REQUESTS),
        (EngineCoreProc, "_process_engine_step", parts.LOOP),
        (Scheduler, "schedule", parts.SCHEDULE),
        (Scheduler, "update_from_output", parts.UPDATE),
    ]


def _output_of_step(_: LeaderSession, method: str, args: tuple[Any, ...], *__: Any) -> Any:
    """vLLM's SchedulerOutput in the arguments of the leader's `_step`; None if they are for sampling."""
    return args[0] if method == EXECUTE else None
