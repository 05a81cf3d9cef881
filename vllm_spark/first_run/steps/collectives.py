"""The steps of collectives: packets, payloads, both mixed, cleared slots, and CUDA graphs; each result is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_spark.collective import CollectiveError, Counters, Runtime
from vllm_spark.first_run.context import Context
from vllm_spark.first_run.result import Advice, Outcome, StepFailedError

if TYPE_CHECKING:
    from vllm_spark.first_run.checked import CheckedCollectives

COUNT = {"cuda": 2000, "cpu": 60}
"""Collectives of each step, by device."""

CLEAR_INTERVAL = 16
"""Messages between two clearings of the slots in the step `clearing`: so few that every few collectives clear them."""

GRAPH_COLLECTIVES, GRAPH_REPLAYS = 20, 50

LARGEST = {"cuda": 1 << 20, "cpu": 1 << 15}
"""Elements of the largest random input, by device."""

CHUNKED_SLOTS = 3
"""Slots that the largest input of the step `payloads` fills: it is sent in so many chunks."""

_FAILED = Advice(
    "single writes work over every rail, and the protocol of collectives does not",
    "run it again, and if it fails again send the report files of both machines to the maintainers",
)


def run_packets(context: Context) -> Outcome:
    """Small messages, which are sent as packets with flags (LL)."""
    with _runtime(context, "packets") as runtime:
        largest = max(1, (runtime.options.packet_bytes or 0) // 8)  # an all-gather sends the input, in up to 4 bytes
        _exercise(context, _checked(runtime, 1, largest))
        return _outcome(runtime.counters(), "packet_messages", "payload_messages")


def run_payloads(context: Context) -> Outcome:
    """Messages of all sizes, each with its flag after the payload (Simple)."""
    with _runtime(context, "payloads", packet_bytes=0) as runtime:
        _exercise(context, _checked(runtime, 2, LARGEST[context.device]), CHUNKED_SLOTS * runtime.options.slot_bytes)
        return _outcome(runtime.counters(), "payload_messages", "packet_messages")


def run_mixed(context: Context) -> Outcome:
    """Random sizes of both protocols."""
    with _runtime(context, "mixed sizes") as runtime:
        _exercise(context, _checked(runtime, 3, LARGEST[context.device]))
        return _outcome(runtime.counters())


def run_clearing(context: Context) -> Outcome:
    """The same with slots that are cleared every `CLEAR_INTERVAL` messages, as they are after 2^30 in serving."""
    with _runtime(context, "clearing of slots", clear_interval=CLEAR_INTERVAL) as runtime:
        _exercise(context, _checked(runtime, 4, LARGEST[context.device]))
        return _outcome(runtime.counters())


def run_graphs(context: Context) -> Outcome:
    """Collectives in a CUDA graph that is replayed, after eager ones; needs a GPU."""
    if context.device != "cuda":
        return Outcome("a machine has no GPU: eager collectives of CPU tensors only", skipped=True)
    import torch

    from vllm_spark.first_run.checked import compare_digests

    with _runtime(context, "CUDA graphs") as runtime:
        checked = _checked(runtime, 5, 1 << 16)
        calls, expected = checked.captured(GRAPH_COLLECTIVES)
        for call in calls:
            call()  # eager, before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = [call() for call in calls]
        context.meet()
        for _ in range(GRAPH_REPLAYS):
            for result in results:
                result.zero_()
            runtime.wake_proxy()
            graph.replay()
            checked.compare(results, expected)
        compare_digests(context, checked)
        return _outcome(runtime.counters())


@contextmanager
def _runtime(context: Context, what: str, **changed: int) -> Iterator[Runtime]:
    context.note(f"checked collectives: {what}")
    try:
        with context.runtime(**changed) as runtime:
            yield runtime
    except CollectiveError as error:
        raise StepFailedError(f"collectives ({what}) failed ({error})", _FAILED) from None


def _checked(runtime: Runtime, seed: int, largest: int) -> CheckedCollectives:
    """The collectives of a step; torch is imported only here."""
    from vllm_spark.first_run.checked import CheckedCollectives

    return CheckedCollectives(runtime, seed, largest)


def _exercise(context: Context, checked: CheckedCollectives, chunked_bytes: int = 0) -> None:
    """Runs the step's number of collectives, and first one of `chunked_bytes`, if given."""
    from vllm_spark.first_run.checked import compare_digests

    if chunked_bytes:
        checked.run(elements=chunked_bytes // checked.BYTES)
    while checked.done < COUNT[context.device]:
        checked.run()
    checked.check()
    compare_digests(context, checked)


def _outcome(counters: Counters, used: str = "", unused: str = "") -> Outcome:
    """The figures; fails where messages did not use the protocol that the step is about, if it is about one."""
    figures = dataclasses.asdict(counters)
    if used and (figures[unused] or not figures[used]):
        raise StepFailedError(
            f"{figures[used]} {used} and {figures[unused]} {unused} were counted, and only {used} were expected",
            _FAILED,
        )
    operations = counters.all_reduces + counters.all_gathers
    words = f"{operations} collectives with {counters.packet_messages} packet and {counters.payload_messages} payload"
    return Outcome(f"{words} messages", {"counters": figures})
