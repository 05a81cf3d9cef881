"""The steps of the rails: each alone, all together, and both directions at once, with RDMA writes of CPU memory.

Small writes come first: where they arrive and large ones do not, large packets are lost.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from vllm_spark import _native
from vllm_spark.collective import CollectiveError
from vllm_spark.collective.rendezvous import LinkOffer, both_ready, swap_offers
from vllm_spark.first_run.context import Context
from vllm_spark.first_run.result import Advice, Outcome, StepFailedError
from vllm_spark.first_run.speed import check_latency, check_rates, check_two_way

SMALL, LARGE = 64, 1 << 18
"""Bytes of a small write, and of a large one."""

_WAIT_SECONDS = 20.0
"""Limit for one write; a rail whose packets are lost fails earlier."""

_FIRST_COUNT, _FIRST_WRITES, _MOST = 10, 4, 20_000
_LATENCY_SECONDS, _BANDWIDTH_SECONDS = 0.5, 1.0
_DEPTH = 32

_CONNECT = Advice(
    "no packet gets from one end of the cable to the other",
    "see that the cable is in on both machines, that both ports are active, and that both ends have addresses in one "
    "network (vllm-spark doctor)",
)
_SMALL = Advice(
    "the queue pair is connected, and no data arrives over it",
    "see that the cable is in and both ports are active, then pull it and put it in again at both ends (vllm-spark "
    "doctor)",
)
_LARGE = Advice(
    "small packets arrive and large ones are lost: an MTU that differs between the ends, a switch, or a bad cable",
    "set the same MTU on both interfaces and any switch between them (sudo ip link set dev INTERFACE mtu 9000), or "
    "replace the cable",
)


@dataclasses.dataclass(frozen=True)
class _Count:
    """How often to write: rank 0 determines it."""

    number: int


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What one machine has measured: Gb/s or microseconds; 0 on a machine that does not measure."""

    value: float


def run_alone(context: Context, rail: int) -> Outcome:
    """One rail: connect, small writes, large writes in each direction."""
    return _run(context, [rail])


def run_together(context: Context) -> Outcome:
    """All rails at once."""
    return _run(context, list(range(len(context.rails))))


def run_two_way(context: Context) -> Outcome:
    """Large writes in both directions at the same time: over each rail alone, and over all of them."""
    rails = list(range(len(context.rails)))
    figures: dict[str, float] = {}
    with _connected(context, rails) as probe:
        for chosen in [*([rail] for rail in rails), *([rails] if len(rails) > 1 else [])]:
            names = _names(context, chosen)
            context.note(f"large writes in both directions over {names}")
            count = _agreed_count(context, partial(_stream_count, probe, chosen))
            with _explained(f"large writes in both directions over {names} failed", _LARGE):
                mine = _Measured(_gbits(probe, chosen, count))
            figures[_key(chosen)] = mine.value + context.swap(mine).value
    alone = {context.rail_name(rail): figures[f"rail_{rail}_two_way_gbits"] for rail in rails}
    total = figures.get("total_two_way_gbits", figures["rail_0_two_way_gbits"])
    warning = check_two_way(alone, total, context.limits_apply)
    return Outcome(
        f"{', '.join(f'{rate:.1f}' for rate in alone.values())} Gb/s alone, {total:.1f} Gb/s together",
        {name: round(value, 3) for name, value in figures.items()},
        *(warning or ("", None)),
    )


def _key(chosen: list[int]) -> str:
    return f"rail_{chosen[0]}_two_way_gbits" if len(chosen) == 1 else "total_two_way_gbits"


def _run(context: Context, rails: list[int]) -> Outcome:
    names = _names(context, rails)
    with _connected(context, rails) as probe:
        chosen = list(range(len(rails)))
        context.note(f"small writes over {names}")
        with _explained(f"{names} carried no write of {SMALL} bytes", _SMALL):
            latency = _latency(context, probe, chosen, SMALL)
        context.note(f"large writes over {names}")
        with _explained(f"{names} carried writes of {SMALL} bytes and none of {LARGE}", _LARGE):
            large_latency = _latency(context, probe, chosen, LARGE)
            rates = []
            for sender in (0, 1):
                count = _agreed_count(context, partial(_stream_count, probe, chosen), sender)
                mine = _Measured(_gbits(probe, chosen, count) if context.rank == sender else 0.0)
                rates.append(max(mine.value, context.swap(mine).value))
    figures = {
        "small_write_us": round(latency, 3),
        "large_write_us": round(large_latency, 3),
        "gbits": [round(rate, 3) for rate in rates],
    }
    names_of_ways = ("from the listening machine", "to the listening machine")
    warning = check_latency({names: latency}) or check_rates(
        names, dict(zip(names_of_ways, rates, strict=True)), len(rails), context.limits_apply
    )
    value = f"{latency:.1f} us for {SMALL} bytes, {rates[0]:.1f} and {rates[1]:.1f} Gb/s"
    return Outcome(value, figures, *(warning or ("", None)))


def _names(context: Context, rails: Sequence[int]) -> str:
    return " and ".join(context.rail_name(rail) for rail in rails)


@contextmanager
def _connected(context: Context, rails: list[int]) -> Iterator[_native.WireProbe]:
    """A probe of these rails of both machines; its rails are numbered from 0."""
    names = _names(context, rails)
    context.note(f"connecting {names}")
    offer, problem, probe = b"", "", None
    try:
        probe = _native.WireProbe(
            rails=[context.rails[rail] for rail in rails],
            largest=LARGE,
            timeout_s=_WAIT_SECONDS,
            rail_timeout_s=context.config.rail_timeout,
            traffic_class=context.config.traffic_class,
            service_level=context.config.service_level,
            attend=context.peer.check,
        )
        offer = probe.offer()
    except CollectiveError as error:
        problem = str(error)
    with _explained(f"{names} could not be connected", _CONNECT):
        theirs = swap_offers(context.peer.exchange, LinkOffer(offer, problem))
        assert probe is not None, "swap_offers raises where there is none"
        try:
            probe.connect(theirs, context.peer.name)
        except CollectiveError as error:
            problem = str(error)
        both_ready(context.peer.exchange, problem)
    yield probe


@contextmanager
def _explained(seen: str, advice: Advice) -> Iterator[None]:
    try:
        yield
    except CollectiveError as error:
        raise StepFailedError(f"{seen} ({error})", advice) from None


def _latency(context: Context, probe: _native.WireProbe, rails: list[int], size: int) -> float:
    """The median one-way time in microseconds."""
    median = _exchange_writes(context, probe, rails, size, _FIRST_COUNT)
    count = min(_MOST, int(_LATENCY_SECONDS / (2e-6 * max(median, 0.1))))
    count = _agreed_count(context, lambda: count)
    return median if count <= _FIRST_COUNT else _exchange_writes(context, probe, rails, size, count)


def _exchange_writes(context: Context, probe: _native.WireProbe, rails: list[int], size: int, count: int) -> float:
    median = 0.0
    if context.rank == 0:
        median = statistics.median(probe.ping(rails, size, count))
    else:
        probe.answer(rails, size, count)
    return max(median, context.swap(_Measured(median)).value)


def _stream_count(probe: _native.WireProbe, rails: list[int]) -> int:
    """How many large writes take about `_BANDWIDTH_SECONDS`."""
    count = _FIRST_WRITES * len(rails)
    seconds = probe.stream(rails, LARGE, count, _DEPTH)
    return max(count, min(_MOST, int(count * _BANDWIDTH_SECONDS / max(seconds, 1e-6))))


def _gbits(probe: _native.WireProbe, rails: list[int], count: int) -> float:
    return count * LARGE * 8 / probe.stream(rails, LARGE, count, _DEPTH) / 1e9


def _agreed_count(context: Context, determine: Callable[[], int], rank: int = 0) -> int:
    """What `determine` returns on `rank`, on both."""
    mine = _Count(determine() if context.rank == rank else 0)
    return max(mine.number, context.swap(mine).number)
