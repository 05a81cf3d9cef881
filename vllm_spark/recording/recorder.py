"""Records one rank for a number of decode steps, and ends by itself."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

from vllm_spark.collective import Runtime
from vllm_spark.recording.kernels import KernelRecorder
from vllm_spark.recording.parts import HOST_PARTS
from vllm_spark.recording.probes import Probes
from vllm_spark.recording.records import RankRecording, Step, TraceRequest
from vllm_spark.recording.span_log import SpanLog

_OTHER_STEPS = 1000  # steps that are recorded besides the decode steps, such as those of prompts
_SPANS_PER_STEP = 64
_OPERATIONS = 1 << 17  # collectives, and as many posted messages: 14 MiB, for 600 steps of a model of 100 layers

SCOPES_MODULE, SCOPES_FUNCTION = "vllm.v1.utils", "_PROFILER_FUNC"
"""Where vLLM keeps the function that makes its scopes for profilers; None until its first use."""


class Recorder:
    """One recording of one rank. For the thread that runs its model.

    Args:
        rank: this process's.
        host: this machine's name.
        request: how much is recorded.
        runtime: this rank's end of the collectives.
    """

    def __init__(self, rank: int, host: str, request: TraceRequest, runtime: Runtime) -> None:
        self._rank, self._host, self._request, self._runtime = rank, host, request, runtime
        self.spans = SpanLog((request.steps + _OTHER_STEPS) * _SPANS_PER_STEP)
        self._steps: list[Step] = []
        self._left = request.steps + 1  # the last one ends where another one begins
        self._probes = Probes()
        self._kernels = KernelRecorder()
        self._deadline = 0.0
        self._running = False

    def start(self, functions: list[tuple[Any, str, str]], step: tuple[Any, str, Callable[..., Any]]) -> None:
        """Begins; if that fails, nothing stays replaced.

        Args:
            functions: that are spans: the object or class, the attribute, the part.
            step: that runs a worker's call: the object, the attribute, and a function that gets the arguments of each
                call and returns vLLM's SchedulerOutput if a step begins with it, else None.
        """
        self._running = True
        try:
            self._kernels.start()
            self._runtime.start_recording(_OPERATIONS)
            for owner, name, part in functions:
                self._probes.replace(owner, name, self.spans.timed(part))
            owner, name, output_of = step
            self._probes.replace(owner, name, functools.partial(self._noting_steps, output_of))
            if (scopes := _scopes_module()) is not None:
                self._probes.replace(scopes, SCOPES_FUNCTION, lambda _: self.spans.scope)
        except BaseException:
            self.result()  # puts back what has been replaced
            raise
        self._deadline = time.monotonic() + self._request.seconds  # the profiler's start may have taken seconds

    @property
    def running(self) -> bool:
        """Whether it still records; False at the latest some time after `seconds` of its request."""
        if self._running and time.monotonic() > self._deadline:
            self.stop()
        return self._running

    def stop(self) -> None:
        """Ends the recording; may be called again."""
        if not self._running:
            return
        self._running = False
        self._probes.restore()
        self._kernels.stop()

    def result(self) -> RankRecording:
        """Ends the recording, and returns it. Only once."""
        self.stop()
        records = self._runtime.stop_recording()
        names, kernels = self._kernels.taken()
        return RankRecording(
            rank=self._rank,
            host=self._host,
            process=os.getpid(),
            steps=self._steps,
            parts=list(HOST_PARTS),
            spans=self.spans.spans,
            operations=records.operations,
            posts=records.posts,
            names=names,
            kernels=kernels,
            lost=records.lost + self.spans.lost,
        )

    def _noting_steps(self, output_of: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def call(*args: Any, **kwargs: Any) -> Any:
            if (output := output_of(*args, **kwargs)) is not None:
                self._note(output)
            return run(*args, **kwargs)

        return call

    def _note(self, output: Any) -> None:
        step = _step_of(output, time.monotonic_ns())
        if step.tokens == 0:
            return  # nothing but the end of requests
        self._steps.append(step)
        if step.decode and step.sequences >= self._request.sequences:
            self._left -= 1
        if (
            self._left == 0
            or len(self._steps) >= self._request.steps + _OTHER_STEPS
            or time.monotonic() > self._deadline
        ):
            self.stop()


def _step_of(output: Any, start: int) -> Step:
    """The step that vLLM's SchedulerOutput describes: its counts, and nothing of its requests."""
    drafts = output.scheduled_spec_decode_tokens
    counts = output.num_scheduled_tokens
    decode = not output.scheduled_new_reqs and all(
        count == 1 + len(drafts.get(request, ())) for request, count in counts.items()
    )
    return Step(start, bool(decode), len(counts), int(output.total_num_scheduled_tokens))


def _scopes_module() -> Any:
    import importlib

    try:
        return importlib.import_module(SCOPES_MODULE)
    except ImportError:
        return None
