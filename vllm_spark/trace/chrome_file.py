"""The trace as a file of Chrome's trace event format, which Perfetto (ui.perfetto.dev) and chrome://tracing show.

Both ranks are processes of the file, on the leader's clock. The format: "Trace Event Format", Google, 2016 (complete
events X, instant events i, flows s and f, metadata M; times in microseconds).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_spark import __version__
from vllm_spark.files import atomic_write_text
from vllm_spark.ranks import LEADER_RANK
from vllm_spark.recording.parts import COLLECTIVES, READ, SEND, WAIT_PEER, WAITS
from vllm_spark.trace.kernel_parts import part_of
from vllm_spark.trace.step_parts import LaneParts
from vllm_spark.trace.timeline import Interval, PairTimeline, RankTimeline

_STEPS, _THREAD, _PROXY, _FIRST_STREAM = 1, 2, 3, 10
"""Rows ("threads") of a rank."""

_ROLES = ("leader", "follower")
_WAIT_COLOUR = "terrible"
"""Chrome's name of a red; Perfetto chooses its colours itself."""


def write_trace(path: Path, pair: PairTimeline, lanes: list[LaneParts], about: dict[str, Any]) -> None:
    """Writes the file.

    Args:
        path: the file.
        pair: what was recorded.
        lanes: the parts, which the file has as well.
        about: further facts for its metadata.

    Raises:
        ConfigurationError: it cannot be written.
    """
    atomic_write_text(path, json.dumps(trace_of(pair, lanes, about), separators=(",", ":")), "trace")


def trace_of(pair: PairTimeline, lanes: list[LaneParts], about: dict[str, Any]) -> dict[str, Any]:
    """The file's content."""
    zero = _zero(pair)
    clock = pair.clock
    events: list[dict[str, Any]] = []
    for rank in pair.ranks:
        events += _metadata(rank, pair)
        events += _steps(rank, pair, zero)
        events += _host(rank, zero)
        events += _posts(rank, zero)
        events += _kernels(rank, zero)
    events += _flows(pair, zero)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {
            "vllm_spark": __version__,
            "clock": "the leader's; the follower's times are converted to it",
            "follower_clock_ahead_ns": clock.offset,
            "follower_clock_drift_ppm": round(clock.drift_ppm, 3),
            "clock_uncertainty_ns": clock.uncertainty,
            "clock_uncertainty": "a bound: half of the shortest round trip over the channel, of "
            "those before and after the steps; times of different ranks compare no better than that",
            "zero_ns": zero,
            "records_that_found_no_room": sum(rank.recording.lost for rank in pair.ranks),
            **about,
            "parts_us": [_lane_of(lane) for lane in lanes],
        },
    }


def _zero(pair: PairTimeline) -> int:
    """The earliest time, which becomes 0: microseconds since a machine's start have too many digits for a float."""
    starts = [rank.spans[0].start for rank in pair.ranks if rank.spans]
    starts += [rank.to_leader(rank.recording.steps[0].start) for rank in pair.ranks if rank.recording.steps]
    return min(starts)


def _metadata(rank: RankTimeline, pair: PairTimeline) -> Iterator[dict[str, Any]]:
    number, recording = rank.recording.rank, rank.recording
    name = f"rank {number} ({_ROLES[number]}) on {recording.host}, process {recording.process}"
    if number != LEADER_RANK:
        name += f", times within {pair.clock.uncertainty / 1e3:.1f} us"
    yield _meta("process_name", number, 0, {"name": name})
    yield _meta("process_sort_index", number, 0, {"sort_index": number})
    rows = {_STEPS: "steps", _THREAD: "thread that runs the model"}
    if recording.posts:
        rows[_PROXY] = "messages posted by the proxy"
    for stream in sorted({kernel.stream for kernel in recording.kernels}):
        rows[_FIRST_STREAM + stream] = f"GPU, stream {stream}"
    for row, title in rows.items():
        yield _meta("thread_name", number, row, {"name": title})
        yield _meta("thread_sort_index", number, row, {"sort_index": row})


def _meta(name: str, process: int, row: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": process, "tid": row, "args": args}


def _steps(rank: RankTimeline, pair: PairTimeline, zero: int) -> Iterator[dict[str, Any]]:
    for number, (step, window) in enumerate(zip(rank.recording.steps, rank.host, strict=True)):
        if window is not None:
            args = {
                "step": number,
                "sequences": step.sequences,
                "tokens": step.tokens,
                "compared": number in pair.chosen,
            }
            name = "decode step" if step.decode else "step with prompts"
            yield _complete(rank, _STEPS, Interval(name, window.start, window.end), zero, args)


def _host(rank: RankTimeline, zero: int) -> Iterator[dict[str, Any]]:
    operations = {rank.to_leader(each.start): each for each in rank.recording.operations}
    for span in rank.spans:
        args: dict[str, Any] = {}
        operation = operations.get(span.start) if span.part == COLLECTIVES else None
        if operation is not None:
            args = {
                "kind": operation.kind,
                "bytes": operation.bytes,
                "protocol": _protocol(operation.packets),
                "sequence": operation.sequence,
                "messages": operation.messages,
                "sent_us": (operation.sent - operation.start) / 1e3,
                "arrived_us": (operation.arrived - operation.start) / 1e3,
                "waited_us": operation.waited / 1e3,
            }
            span = span._replace(part=f"{operation.kind} of {operation.bytes} bytes")
        elif span.part == WAIT_PEER:
            span = span._replace(part=f"{WAIT_PEER}, rank {1 - rank.recording.rank}")
        yield _complete(rank, _THREAD, span, zero, args)


def _posts(rank: RankTimeline, zero: int) -> Iterator[dict[str, Any]]:
    for post in rank.recording.posts:
        yield {
            "ph": "i",
            "s": "t",
            "name": f"post of {post.bytes} bytes",
            "cat": "wire",
            "pid": rank.recording.rank,
            "tid": _PROXY,
            "ts": _us(rank.to_leader(post.time) - zero),
            "args": {
                "sequence": post.sequence,
                "piece": post.piece,
                "bytes": post.bytes,
                "protocol": _protocol(post.packets),
            },
        }


def _kernels(rank: RankTimeline, zero: int) -> Iterator[dict[str, Any]]:
    names = rank.recording.names
    for kernel in rank.recording.kernels:
        span = Interval(names[kernel.name], rank.to_leader(kernel.start), rank.to_leader(kernel.end))
        args = {"part": part_of(names[kernel.name])}
        yield _complete(rank, _FIRST_STREAM + kernel.stream, span, zero, args)


def _flows(pair: PairTimeline, zero: int) -> Iterator[dict[str, Any]]:
    """Arrows from the leader's sending of a step to the follower's reading."""
    leader, follower = pair.ranks
    for number, (sender, receiver) in enumerate(zip(leader.host, follower.host, strict=True)):
        sent = [each for each in sender.intervals if each.part == SEND] if sender else []
        read = [each for each in receiver.intervals if each.part == READ] if receiver else []
        if sent and read:
            common = {"name": SEND, "cat": "channel", "id": number}
            yield {**common, "ph": "s", "pid": 0, "tid": _THREAD, "ts": _us(sent[0].start - zero)}
            yield {**common, "ph": "f", "bp": "e", "pid": 1, "tid": _THREAD, "ts": _us(read[0].start - zero)}


def _complete(rank: RankTimeline, row: int, span: Interval, zero: int, args: dict[str, Any]) -> dict[str, Any]:
    event: dict[str, Any] = {
        "ph": "X",
        "name": span.part,
        "cat": "wait" if span.part.split(",")[0] in WAITS else "step",
        "pid": rank.recording.rank,
        "tid": row,
        "ts": _us(span.start - zero),
        "dur": _us(span.end - span.start),
    }
    if event["cat"] == "wait":
        event["cname"] = _WAIT_COLOUR
    if args:
        event["args"] = args
    return event


def _lane_of(lane: LaneParts) -> dict[str, Any]:
    return {
        "rank": lane.rank,
        "lane": lane.lane,
        "steps": lane.steps,
        "step": {"median": lane.step.median, "p90": lane.step.p90},
        "sum_of_parts": lane.covered,
        "agrees": lane.agrees,
        "parts": {part.part: {"median": part.median, "p90": part.p90} for part in lane.parts},
    }


def _protocol(packets: bool) -> str:
    return "LL" if packets else "Simple"


def _us(nanoseconds: int) -> float:
    return nanoseconds / 1000
