"""What is recorded, as records that are sent as JSON. Times are `time.monotonic_ns()` of the rank's machine.

Nothing in them comes from a prompt or an answer: names of functions and kernels, sizes, counts and times.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from vllm_spark.collective import OperationRecord, PostRecord
from vllm_spark.recording.clock_offset import ClockOffset

MOST_STEPS, MOST_SEQUENCES, MOST_SECONDS = 1000, 4096, 3600.0
"""The limits of a recording."""

PATH = "/v1/spark/trace"
"""Where the leader's HTTP server takes a `TraceRequest`. Below /v1, where vLLM checks its API key."""


@dataclasses.dataclass(frozen=True)
class TraceRequest:
    """What a client asks of the leader.

    Attributes:
        action: start a recording, or end it and send it.
        steps: decode steps to record.
        sequences: of a step that counts as one of them, at least.
        seconds: after which the recording ends in any case.
    """

    action: Literal["start", "collect"]
    steps: int = 50
    sequences: int = 1
    seconds: float = 120.0

    def problem(self) -> str:
        """Which value is out of its range, a sentence without a full stop; empty if none is."""
        if not 1 <= self.steps <= MOST_STEPS:
            return f"{self.steps} steps are invalid: must be 1 to {MOST_STEPS}"
        if not 1 <= self.sequences <= MOST_SEQUENCES:
            return f"{self.sequences} sequences are invalid: must be 1 to {MOST_SEQUENCES}"
        if not 0 < self.seconds <= MOST_SECONDS:
            return f"{self.seconds:g} seconds are invalid: must be more than 0, and at most {MOST_SECONDS:g}"
        return ""


class Span(NamedTuple):
    """A part of the host's thread; spans contain each other or do not overlap.

    Attributes:
        part: its index in `RankRecording.parts`.
        start: when it began.
        end: when it ended.
    """

    part: int
    start: int
    end: int


class Step(NamedTuple):
    """A step of the model.

    Attributes:
        start: when the worker's call began.
        decode: whether every sequence got its next token (or verified drafts), and none a part of its prompt.
        sequences: of the step.
        tokens: rows of the step's matrices.
    """

    start: int
    decode: bool
    sequences: int
    tokens: int


class Kernel(NamedTuple):
    """A kernel, or a copy, on a GPU.

    Attributes:
        name: its index in `RankRecording.names`.
        stream: of the GPU.
        start: when it began.
        end: when it ended.
        launched: when the host launched it, or the graph that has it; 0 if that is not known.
    """

    name: int
    stream: int
    start: int
    end: int
    launched: int


@dataclasses.dataclass(frozen=True)
class RankRecording:
    """What one rank did.

    Attributes:
        rank: 0 or 1.
        host: the machine.
        process: its id there.
        steps: every step that began, in order; both ranks have the same ones.
        parts: names of spans.
        spans: of the thread that runs the model, in the order of their ends.
        operations: collectives on CPU tensors.
        posts: messages that the proxy posted.
        names: of kernels.
        kernels: of the GPU.
        lost: records that found no room.
    """

    rank: int
    host: str
    process: int
    steps: list[Step]
    parts: list[str]
    spans: list[Span]
    operations: list[OperationRecord]
    posts: list[PostRecord]
    names: list[str]
    kernels: list[Kernel]
    lost: int


@dataclasses.dataclass(frozen=True)
class PairRecording:
    """What both ranks did, in rank order.

    Attributes:
        ranks: of both.
        clocks: the follower's clock against the leader's, before and after the steps.
    """

    ranks: list[RankRecording]
    clocks: list[ClockOffset]


@dataclasses.dataclass(frozen=True)
class TraceAnswer:
    """What the leader answers.

    Attributes:
        recording: of an action `collect` that succeeded.
        refusal: why the action failed, a sentence without a full stop; empty if it did not.
    """

    recording: PairRecording | None = None
    refusal: str = ""
