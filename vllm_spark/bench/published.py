"""What others measured on real pairs of GB10: an all-reduce of bfloat16 in a CUDA graph, in microseconds.

They are other machines, measured in other ways at other times; beside them, figures over the modelled link say what to
expect of a pair, and prove nothing.
"""

from __future__ import annotations

from typing import NamedTuple

KIB, MIB = 1 << 10, 1 << 20


class PublishedTime(NamedTuple):
    """One figure."""

    microseconds: float
    project: str


SOURCES = {
    "sparknet": "github.com/christopherowen/dgx-spark-networking 0.3.0, two DGX Spark, 2026-10-05, 256 calls in a "
    "graph, median of the slower rank",
    "libsircl": "github.com/FujitsuPolycom/sparkring 2026.10.2, two DGX Spark, 2026-10-08",
}
"""Where each project published its figures, and how they were measured."""

PUBLISHED: dict[int, tuple[PublishedTime, ...]] = {
    8 * KIB: (PublishedTime(9.1, "sparknet"), PublishedTime(9.55, "libsircl")),
    10 * KIB: (PublishedTime(10.9, "sparknet"),),
    60 * KIB: (PublishedTime(17.0, "sparknet"),),
    128 * KIB: (PublishedTime(18.35, "libsircl"),),
    480 * KIB: (PublishedTime(43.1, "sparknet"),),
    2 * MIB: (PublishedTime(137.1, "sparknet"),),
    4 * MIB: (PublishedTime(212, "libsircl"),),
    64 * MIB: (PublishedTime(2812, "libsircl"),),
}
"""By bytes of each rank's input."""


def published_text(size: int) -> str:
    """The figures for this size: `9.1 sparknet`, or several with commas; empty if there are none."""
    return ", ".join(f"{time.microseconds:g} {time.project}" for time in PUBLISHED.get(size, ()))
