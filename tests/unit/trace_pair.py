"""A recording of both ranks that is made up, with times that a test knows."""

from __future__ import annotations

from typing import Any

from vllm_spark.collective import OperationRecord, PostRecord
from vllm_spark.recording import parts
from vllm_spark.recording.clock_offset import ClockOffset
from vllm_spark.recording.records import Kernel, PairRecording, RankRecording, Span, Step

AHEAD = 5_000_000_000_000
"""Nanoseconds by which the follower's clock is ahead."""
STEP, STEPS, COLLECTIVES = 1_300_000, 12, 20
BEGIN = 10**9
WAITED = 6_000
"""Nanoseconds of each wait; every other collective of a rank has one."""


def recording(rank: int, *, unexplained: int = 0, kernels: bool = False, **changes: Any) -> RankRecording:
    """One rank's, on its own clock.

    Args:
        rank: 0 or 1.
        unexplained: nanoseconds of each step that no span has.
        kernels: whether it has a GPU's.
        changes: other fields.
    """
    spans: list[Span] = []
    steps: list[Step] = []
    operations: list[OperationRecord] = []
    posts: list[PostRecord] = []
    gpu: list[Kernel] = []

    def span(part: str, start: int, end: int) -> None:
        spans.append(Span(parts.HOST_PARTS.index(part), start, end))

    for number in range(STEPS):
        begin = BEGIN + number * STEP + rank * AHEAD
        if rank == 0:
            span(parts.SCHEDULE, begin, begin + 50_000)
            span(parts.SEND, begin + 60_000, begin + 160_000)
            call = begin + 55_000
        else:
            span(parts.WAIT_STEP, begin, begin + 170_000)
            span(parts.READ, begin + 180_000, begin + 200_000)
            call = begin + 205_000
        steps.append(Step(call, True, 1, 1))
        forward = begin + 320_000
        span(parts.PREPARE, begin + 210_000, forward)
        at = forward
        for index in range(COLLECTIVES):
            at += 30_000
            waits = index % 2 == rank
            operations.append(
                OperationRecord(
                    *("all_reduce", 2048, number * COLLECTIVES + index + 1, 1, True, at, at + 2_000),
                    *((at + 3_000 if waits else 0), at + 9_000, at + 10_000, WAITED if waits else 0),
                )
            )
            posts.append(PostRecord(number * COLLECTIVES + index + 1, 0, 4112, True, at + 2_500))
            at += 10_000
        span(parts.FORWARD, forward, at)
        span(parts.SAMPLE, at, at + 60_000)
        span(parts.WORKER, call, at + 70_000)
        span(parts.LOOP, begin, begin + STEP - unexplained)
        if kernels:
            first = begin + 400_000
            gpu.append(Kernel(0, 7, first, first + 200_000, begin + 330_000))
            gpu.append(Kernel(1, 7, first + 250_000, first + 300_000, begin + 330_000))
            gpu.append(Kernel(0, 9, first + 290_000, first + 400_000, begin + 330_000))
    made = {
        "rank": rank,
        "host": f"desk{rank + 1}",
        "process": 4711 + rank,
        "steps": steps,
        "parts": list(parts.HOST_PARTS),
        "spans": spans,
        "operations": operations,
        "posts": posts,
        "names": ["void marlin_moe<4>(int)", "all_reduce_packets_bfloat16"] if kernels else [],
        "kernels": gpu,
        "lost": 0,
    }
    return RankRecording(**{**made, **changes})


def pair_recording(**options: Any) -> PairRecording:
    """Of both ranks, with the same `options` for each."""
    clocks = [ClockOffset(BEGIN, AHEAD, 9_000, 400), ClockOffset(2 * BEGIN, AHEAD, 11_000, 400)]
    return PairRecording([recording(0, **options), recording(1, **options)], clocks)
