"""The counters of an idle pair, as `/metrics` has them."""

from __future__ import annotations

import time

from .servers import Server

SETTLE_SECONDS = 30.0
QUIET_SECONDS = 2.5
COMPARED = ("vllm_spark_steps_total", "vllm_spark_all_reduces_total")


def settled(server: Server) -> dict[str, dict[str, float]]:
    """The counters of an idle pair: the same on both ranks, and no change for longer than a heartbeat.

    Each rank's counters are published with its own heartbeat, once a second: equal ones alone may be equally old.
    """
    seen: list[tuple[float, dict[str, dict[str, float]]]] = []

    def look() -> dict[str, dict[str, float]] | None:
        now, values = time.monotonic(), server.metrics()
        if seen and any(values[name] != seen[-1][1][name] for name in COMPARED):
            seen.clear()
        seen.append((now, values))
        equal = all(values[name]["0"] == values[name]["1"] for name in COMPARED)
        return values if equal and now - seen[0][0] > QUIET_SECONDS else None

    return server.leader.wait_until(look, SETTLE_SECONDS, "settled its counters")
