"""Checks measured times and rates: absolute limits hold for GB10 machines, comparisons of rails for all."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_spark.first_run.result import Advice

FUNCTION_GBITS = 95.0
"""Gb/s that one PCIe function of a GB10's network card reaches in one direction: 92.6 and 97.3 were measured with
ib_write_bw (NVIDIA/dgx-spark-playbooks, connect-two-sparks), 95 on average."""

ONE_WAY_SHARE = 0.9
"""Share of `FUNCTION_GBITS` below which a direction is slow: the weaker of those functions reached 0.97."""

TWO_WAY_GBITS = 190.0
"""Gb/s of both directions together below which a cable is bad: twice `FUNCTION_GBITS`. Good cables gave 213, bad ones
119, and 109 in one direction both (FujitsuPolycom/sparkring, fabric-cable-bandwidth-20261002)."""

SLOW_WRITE_US = 1000.0
"""Microseconds for a write of 64 bytes beyond which any network card is slow: two GB10 take 1.7 (ib_write_lat)."""

_RATIO = 3.0

_CABLE = Advice(
    "a bad cable may show in both directions at once only, without an error in any counter",
    "restart both machines, then exchange the cable, and run this again",
)
_SLOW = Advice(
    "the network card or its PCIe link works below its speed",
    "see PCIe lanes and MTU with vllm-spark doctor, restart both machines, and exchange the cable",
)
_LATE = Advice(
    "packets are delayed or repeated on their way",
    "see that no other program uses the link or all processor cores, that no switch is between the machines, and "
    "exchange the cable",
)


def check_latency(latencies: Mapping[str, float]) -> tuple[str, Advice] | None:
    """A warning for times of small writes, in microseconds by rail; None if all is well."""
    for name, latency in latencies.items():
        if latency > SLOW_WRITE_US:
            return f"a small write over {name} takes {latency:.0f} us, more than {SLOW_WRITE_US:g}", _LATE
    return None


def check_rates(names: str, rates: Mapping[str, float], rails: int, limits_apply: bool) -> tuple[str, Advice] | None:
    """A warning for rates of one direction at a time, in Gb/s by direction.

    Args:
        names: the rails.
        rates: by direction.
        rails: their number.
        limits_apply: whether absolute limits hold.
    """
    least = FUNCTION_GBITS * ONE_WAY_SHARE * rails
    for way, rate in rates.items():
        if limits_apply and rate < least:
            return f"{names} reached {rate:.1f} Gb/s {way}, less than {least:.1f}", _SLOW
    return _uneven(rates, f"Gb/s over {names}", _SLOW)


def check_two_way(alone: Mapping[str, float], total: float, limits_apply: bool) -> tuple[str, Advice] | None:
    """A warning for rates of both directions together, in Gb/s.

    Args:
        alone: by rail.
        total: of all rails at once.
        limits_apply: whether absolute limits hold.
    """
    if limits_apply:
        for name, rate in alone.items():
            if rate < TWO_WAY_GBITS:
                return f"{name} reached {rate:.1f} Gb/s in both directions, less than {TWO_WAY_GBITS:g}", _CABLE
        if total < (least := TWO_WAY_GBITS * len(alone) * ONE_WAY_SHARE):
            return f"all rails together reached {total:.1f} Gb/s in both directions, less than {least:.1f}", _CABLE
    return _uneven(alone, "Gb/s in both directions", _CABLE)


def _uneven(rates: Mapping[str, float], unit: str, advice: Advice) -> tuple[str, Advice] | None:
    slow, fast = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
    if rates[slow] * _RATIO >= rates[fast]:
        return None
    return f"{slow} reached {rates[slow]:.1f} {unit}, and {fast} {rates[fast]:.1f}", advice
