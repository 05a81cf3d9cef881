"""The parts of a step as tables, and the sentences about their sum and the clocks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.console import Console
from rich.table import Table

from vllm_spark.trace.step_parts import ORDER, THREAD, TOLERANCE, LaneParts, delivery
from vllm_spark.trace.timeline import PairTimeline

_ROLES = ("leader", "follower")


def show(console: Console, pair: PairTimeline, lanes: Sequence[LaneParts], arrivals: Sequence[float]) -> None:
    """Prints a table for the threads, one for the GPUs, and what is to be known of them.

    Args:
        console: for the tables.
        pair: what was recorded.
        lanes: its parts.
        arrivals: microseconds between tokens at the client.
    """
    for kind in dict.fromkeys(lane.lane for lane in lanes):
        console.print(_table(kind, [lane for lane in lanes if lane.lane == kind], pair.sequences))
    for sentence in sentences(pair, lanes, arrivals):
        console.print(sentence, soft_wrap=True)


def sentences(pair: PairTimeline, lanes: Sequence[LaneParts], arrivals: Sequence[float]) -> list[str]:
    """What the tables do not say: sums, delivery, clocks, tokens at the client."""
    found = [_sum(lane) for lane in lanes]
    sent = delivery(pair)
    found.append(
        f"The follower began to read a step {sent.median:,.1f} us (median; 90 %: {sent.p90:,.1f}) after the leader had "
        "sent it."
    )
    clock = pair.clock
    found.append(
        f"Times of different ranks compare within {clock.uncertainty / 1e3:,.1f} us: the follower's clock is "
        f"{clock.offset / 1e9:,.6f} s ahead, and drifts by {clock.drift_ppm:.1f} ppm."
    )
    if arrivals:
        found.append(f"At the client a request's tokens arrived every {median(arrivals):,.1f} us (median).")
    if lost := sum(rank.recording.lost for rank in pair.ranks):
        found.append(f"{lost:,} records found no room: the last steps lack parts; ask for fewer --steps.")
    return found


def _sum(lane: LaneParts) -> str:
    what = f"Rank {lane.rank}, {lane.lane}: the parts add up to {lane.covered:.1%} of the measured step"
    if lane.agrees:
        return f"{what} (median of {lane.steps} steps)."
    return f"{what}: they DIFFER by more than {TOLERANCE:.0%}, so part of the step is not explained."


def _table(kind: str, lanes: Sequence[LaneParts], sequences: int) -> Table:
    title = f"One decode step of {sequences} sequence{'s' if sequences > 1 else ''}, {kind}: microseconds"
    table = Table(title=title)
    table.add_column("part")
    for lane in lanes:
        table.add_column(f"{_ROLES[lane.rank]}, median", justify="right")
        table.add_column("90 %", justify="right")
    by_rank = [{part.part: part for part in lane.parts} for lane in lanes]
    for name in ORDER:
        found = [parts.get(name) for parts in by_rank]
        if not any(found):
            continue
        waits = any(part.waits for part in found if part is not None)
        cells = [
            cell
            for part in found
            for cell in (("", "") if part is None else (f"{part.median:,.1f}", f"{part.p90:,.1f}"))
        ]
        table.add_row(f"{name} (waits)" if waits else name, *cells, style="red" if waits else None)
    table.add_section()
    whole = [cell for lane in lanes for cell in (f"{lane.step.median:,.1f}", f"{lane.step.p90:,.1f}")]
    table.add_row("whole step" if kind == THREAD else "whole step, by the host", *whole, style="bold")
    return table
