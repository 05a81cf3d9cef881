"""The follower's part of a trace: records, and answers the comparison of the clocks."""

from __future__ import annotations

import sys
import time
from typing import Any

from vllm_spark.collective import Runtime
from vllm_spark.errors import SparkError
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.channel.framing import Connection, Kind
from vllm_spark.executor.rpc import (
    CLOCK,
    CLOCK_SPIN,
    CLOCK_TIMEOUT,
    EXECUTE,
    EXECUTE_THEN_SAMPLE,
    TRACE_CLOCK,
    TRACE_START,
    Call,
)
from vllm_spark.executor.tracing.worker import worker_functions
from vllm_spark.ranks import FOLLOWER_RANK
from vllm_spark.recording import parts
from vllm_spark.recording.recorder import Recorder
from vllm_spark.recording.records import TraceRequest
from vllm_spark.records import to_json


class FollowerTrace:
    """The recordings of one session, on the follower.

    Args:
        session: the object that runs the leader's calls.
        runtime: this rank's end of the collectives.
        worker: vLLM's, which runs the model.
    """

    def __init__(self, session: Any, runtime: Runtime, worker: Any) -> None:
        self._session, self._runtime, self._worker = session, runtime, worker
        self._recorder: Recorder | None = None

    def answer(self, call: Call, connection: Connection) -> Any:
        """The result of one of the leader's calls.

        Args:
            call: one of TRACE_METHODS.
            connection: over which it came; the thread that calls this one receives from it.

        Raises:
            SparkError: nothing was recorded, or the leader is lost.
        """
        if call.method == TRACE_CLOCK:
            return answer_clock(connection, *call.args)
        if call.method == TRACE_START:
            (request,) = call.args
            return self._start(request, connection)
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            raise SparkError("no trace was started here")
        return to_json(recorder.result())

    def _start(self, request: TraceRequest, connection: Connection) -> None:
        if self._recorder is not None:
            self._recorder.result()
        self._recorder = Recorder(FOLLOWER_RANK, host_name(), request, self._runtime)
        session = self._session
        self._recorder.start(
            [
                (connection, "expect", parts.WAIT_STEP),
                (session, "_run_call", parts.LOOP),
                (sys.modules[type(session).__module__], "decode_call", parts.READ),
                (session, "_run_step", parts.WORKER),
                *worker_functions(self._worker),
            ],
            (session, "_run_step", _output_of_call),
        )


def _output_of_call(call: Call) -> Any:
    """vLLM's SchedulerOutput in one of the leader's calls; None if it is for sampling."""
    return call.args[0] if call.method in (EXECUTE, EXECUTE_THEN_SAMPLE) else None


def answer_clock(connection: Connection, count: int) -> None:
    """Answers `count` CLOCK frames with the times of this machine's clock.

    Raises:
        ChannelError: the leader is lost, or sends something else.
    """
    for _ in range(count):
        connection.expect(Kind.CLOCK, timeout=CLOCK_TIMEOUT, spin=CLOCK_SPIN)
        received = time.monotonic_ns()
        connection.send(Kind.CLOCK, CLOCK.pack(received, time.monotonic_ns()), timeout=CLOCK_TIMEOUT)
