"""Both ranks' recordings on the leader's clock, as intervals, cut into steps."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from vllm_spark.errors import SparkError
from vllm_spark.estimate.step import HOST
from vllm_spark.recording.clock_offset import LeaderClock
from vllm_spark.recording.parts import COLLECTIVES, SCHEDULE, WAIT_PEER, WAIT_STEP
from vllm_spark.recording.records import Kernel, PairRecording, RankRecording, Step
from vllm_spark.trace.kernel_parts import part_of


class Interval(NamedTuple):
    """A part of a rank's time, in nanoseconds of the leader's clock."""

    part: str
    start: int
    end: int


class Window(NamedTuple):
    """One step of one lane.

    Attributes:
        start: when it began.
        end: when the next one began.
        measured: its length in nanoseconds; of a GPU, whose gaps are the host's part, by the calls of the worker.
        intervals: that fill it, but for what has no part; none overlap.
    """

    start: int
    end: int
    measured: int
    intervals: tuple[Interval, ...]


@dataclasses.dataclass(frozen=True)
class RankTimeline:
    """One rank.

    Attributes:
        recording: as it was recorded, on the rank's own clock.
        to_leader: converts its times to the leader's clock.
        spans: of the host's thread, nested, with collectives and their waits.
        host: steps of the host's thread, by the number of the step; None for the last one, which has no end.
        gpu: the same of the GPU; empty without one.
    """

    recording: RankRecording
    to_leader: Callable[[int], int]
    spans: tuple[Interval, ...]
    host: tuple[Window | None, ...]
    gpu: tuple[Window | None, ...]


@dataclasses.dataclass(frozen=True)
class PairTimeline:
    """Both ranks.

    Attributes:
        ranks: in order.
        chosen: numbers of the decode steps that are compared: the next one is a decode step of as many sequences.
        sequences: of each of these steps.
        clock: the follower's against the leader's.
    """

    ranks: tuple[RankTimeline, RankTimeline]
    chosen: tuple[int, ...]
    sequences: int
    clock: LeaderClock

    def typical(self) -> int:
        """The number of the chosen step whose length is the median on the leader."""
        lengths = [(window.measured, number) for number in self.chosen if (window := self.ranks[0].host[number])]
        return sorted(lengths)[(len(lengths) - 1) // 2][1]


def timeline_of(pair: PairRecording) -> PairTimeline:
    """The timeline of both ranks' recordings.

    Raises:
        SparkError: there are no two decode steps in a row, or the ranks recorded different steps.
    """
    leader, follower = pair.ranks
    shapes = [[step[1:] for step in each.steps] for each in pair.ranks]
    if shapes[0] != shapes[1]:
        raise SparkError(
            f"the ranks recorded different steps ({len(shapes[0])} and {len(shapes[1])}); record again, and report it "
            "if it stays so"
        )
    chosen, sequences = _chosen(leader.steps)
    clock = LeaderClock(*pair.clocks)
    ranks = (_rank(leader, lambda time: time, SCHEDULE), _rank(follower, clock.time, WAIT_STEP))
    return PairTimeline(ranks, chosen, sequences, clock)


def innermost(spans: Iterable[Interval]) -> list[Interval]:
    """Nested intervals cut into the innermost ones, in order; an end beyond that of the outer one is cut off."""
    result: list[Interval] = []
    open_spans: list[Interval] = []
    reached = 0

    def fill(until: int) -> None:
        nonlocal reached
        if until > reached:
            result.append(Interval(open_spans[-1].part, reached, until))
            reached = until

    for span in sorted(spans, key=lambda each: (each.start, -each.end)):
        while open_spans and open_spans[-1].end <= span.start:
            fill(open_spans[-1].end)
            open_spans.pop()
        if open_spans:
            fill(span.start)
            span = span._replace(end=min(span.end, open_spans[-1].end))
        reached = max(reached, span.start)
        open_spans.append(span)
    while open_spans:
        fill(open_spans[-1].end)
        open_spans.pop()
    return result


def within(intervals: Sequence[Interval], start: int, end: int) -> list[Interval]:
    """What lies between `start` and `end`, cut there, of intervals that are in order and do not overlap."""
    first = bisect.bisect_right(intervals, start, key=lambda each: each.end)
    found = []
    for each in intervals[first:]:
        if each.start >= end:
            break
        found.append(Interval(each.part, max(each.start, start), min(each.end, end)))
    return found


def _chosen(steps: Sequence[Step]) -> tuple[tuple[int, ...], int]:
    pairs = [
        number
        for number, (step, following) in enumerate(itertools.pairwise(steps))
        if step.decode and following.decode and step.sequences == following.sequences
    ]
    if not pairs:
        raise SparkError(
            "no two decode steps in a row were recorded; ask for more --steps, or see whether the server answers at all"
        )
    sequences, _ = Counter(steps[number].sequences for number in pairs).most_common(1)[0]
    return tuple(number for number in pairs if steps[number].sequences == sequences), sequences


def _rank(recording: RankRecording, to_leader: Callable[[int], int], first: str) -> RankTimeline:
    spans = tuple(
        Interval(part, to_leader(start), to_leader(end))
        for part, start, end in sorted(_spans(recording), key=lambda each: (each[1], -each[2]))
    )
    marks = [to_leader(step.start) for step in recording.steps]
    starts = [span.start for span in spans if span.part == first]
    begins = [_begin(starts, after, mark) for after, mark in zip([0, *marks], marks, strict=False)]
    return RankTimeline(
        recording,
        to_leader,
        spans,
        _windows(begins, innermost(spans)),
        _gpu(recording, to_leader, marks) if recording.kernels else (),
    )


def _spans(recording: RankRecording) -> Iterable[tuple[str, int, int]]:
    for span in recording.spans:
        yield recording.parts[span.part], span.start, span.end
    for operation in recording.operations:
        yield COLLECTIVES, operation.start, operation.end
        if operation.waited > 0:
            yield WAIT_PEER, operation.wait, min(operation.wait + operation.waited, operation.end)


def _begin(starts: Sequence[int], after: int, mark: int) -> int:
    """The last of `starts` before `mark`, at which a step begins; `mark` itself if the step before began later."""
    index = bisect.bisect_right(starts, mark) - 1
    return starts[index] if index >= 0 and starts[index] > after else mark


def _windows(begins: Sequence[int], intervals: Sequence[Interval]) -> tuple[Window | None, ...]:
    windows: list[Window | None] = [
        Window(begin, end, end - begin, tuple(within(intervals, begin, end)))
        for begin, end in itertools.pairwise(begins)
    ]
    return (*windows, None)


def _gpu(recording: RankRecording, to_leader: Callable[[int], int], marks: Sequence[int]) -> tuple[Window | None, ...]:
    """A GPU's steps: each begins with the first kernel that the host launched in it."""
    parts = [part_of(name) for name in recording.names]
    kernels = [
        Kernel(each.name, each.stream, to_leader(each.start), to_leader(each.end), to_leader(each.launched))
        for each in recording.kernels
        if each.launched > 0
    ]
    firsts: dict[int, int] = {}
    for kernel in kernels:
        number = bisect.bisect_right(marks, kernel.launched) - 1
        if number >= 0:
            firsts[number] = min(firsts.get(number, kernel.start), kernel.start)
    busy = _one_lane(Interval(parts[kernel.name], kernel.start, kernel.end) for kernel in kernels)
    windows: list[Window | None] = []
    for number in range(len(marks)):
        start, end = firsts.get(number), firsts.get(number + 1)
        if start is None or end is None or end <= start:
            windows.append(None)
        else:
            windows.append(Window(start, end, marks[number + 1] - marks[number], tuple(within(busy, start, end))))
    return tuple(windows)


def _one_lane(intervals: Iterable[Interval]) -> list[Interval]:
    """Intervals of several streams without overlaps, the earlier first; between them the host's part."""
    lane: list[Interval] = []
    for each in sorted(intervals, key=lambda each: each.start):
        reached = lane[-1].end if lane else each.start
        if each.start > reached:
            lane.append(Interval(HOST, reached, each.start))
        if each.end > max(reached, each.start):
            lane.append(Interval(each.part, max(reached, each.start), each.end))
    return lane
