"""The parts of a decode step: their times on each rank, and whether they add up to the step."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from vllm_spark.estimate.step import HOST
from vllm_spark.recording.parts import HOST_PARTS, READ, SEND, WAITS
from vllm_spark.trace.kernel_parts import KERNEL_PARTS
from vllm_spark.trace.timeline import Interval, PairTimeline, RankTimeline, Window

TOLERANCE = 0.03
"""Of a step's time, by which the sum of its parts may differ."""

THREAD, GPU = "host thread", "GPU"


@dataclasses.dataclass(frozen=True)
class PartTime:
    """One part, in microseconds of one step.

    Attributes:
        part: its name.
        waits: whether the rank waits meanwhile.
        median: over the steps.
        p90: a tenth of the steps take longer.
    """

    part: str
    waits: bool
    median: float
    p90: float


@dataclasses.dataclass(frozen=True)
class LaneParts:
    """The steps of a rank's thread, or of its GPU.

    Attributes:
        rank: 0 or 1.
        lane: THREAD or GPU.
        steps: that were compared.
        parts: in the order of a step.
        step: the whole step, as measured.
        covered: the sum of the parts, of the measured step, in the median step: 1 if nothing is missing and nothing is
            counted twice. Not of the mean: a rank that is preempted once between two parts would be a part missing.
    """

    rank: int
    lane: str
    steps: int
    parts: tuple[PartTime, ...]
    step: PartTime
    covered: float

    @property
    def agrees(self) -> bool:
        """Whether the parts add up to the step within TOLERANCE."""
        return abs(self.covered - 1) <= TOLERANCE


def lanes_of(pair: PairTimeline) -> list[LaneParts]:
    """Threads of both ranks, then their GPUs."""
    threads = [_lane(rank, THREAD, rank.host, pair.chosen) for rank in pair.ranks]
    gpus = [_lane(rank, GPU, rank.gpu, pair.chosen) for rank in pair.ranks]
    return [lane for lane in (*threads, *gpus) if lane is not None]


def delivery(pair: PairTimeline) -> PartTime:
    """From the end of the leader's sending to the follower's beginning to read; as uncertain as the clocks' offset."""
    times = []
    for number in pair.chosen:
        sent = [each.end for each in _intervals(pair.ranks[0], number) if each.part == SEND]
        read = [each.start for each in _intervals(pair.ranks[1], number) if each.part == READ]
        if sent and read:
            times.append((read[0] - sent[0]) / 1e3)
    return _part("delivery", times or [float("nan")])


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lie, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _intervals(rank: RankTimeline, number: int) -> Sequence[Interval]:
    window = rank.host[number]
    return window.intervals if window is not None else ()


def _lane(rank: RankTimeline, lane: str, windows: Sequence[Window | None], chosen: Sequence[int]) -> LaneParts | None:
    found = [window for number in chosen if number < len(windows) and (window := windows[number]) is not None]
    if not found:
        return None
    sums = []
    for window in found:
        times: dict[str, float] = defaultdict(float)
        for each in window.intervals:
            times[each.part] += (each.end - each.start) / 1e3
        sums.append(times)
    names = {name for times in sums for name in times}
    measured = [window.measured / 1e3 for window in found]
    return LaneParts(
        rank=rank.recording.rank,
        lane=lane,
        steps=len(found),
        parts=tuple(_part(name, [times.get(name, 0.0) for times in sums]) for name in ORDER if name in names),
        step=_part("step", measured),
        covered=median(sum(times.values()) / whole for times, whole in zip(sums, measured, strict=True)),
    )


def _part(name: str, times: Sequence[float]) -> PartTime:
    return PartTime(name, name in WAITS, median(times), quantile(times, 0.9))


ORDER = tuple(dict.fromkeys((*HOST_PARTS, *KERNEL_PARTS, HOST)))
"""Parts in the order of reports."""
