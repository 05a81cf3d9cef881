"""How long a collective of two machines takes, alone and in a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_spark.collective.link_model import PUBLISHED_FIGURES, WireFigures

KIB, MIB = 1 << 10, 1 << 20

Points = Sequence[tuple[int, float]]
"""Bytes of a rank's input, ascending, and microseconds."""


@dataclass(frozen=True)
class Collectives:
    """An implementation of all-reduces and all-gathers.

    Attributes:
        name: for people, as in `vllm_spark over the cable`.
        points: the time of one, as if the link took none if there is a link.
        link: whose least time comes in addition; None: it is in the points.
        hidden: share of the time of one that a step does not wait for, because the step's other kernels run meanwhile.
        pieces: whether it runs between graphs, which divides a step's graph there.
        rank_bytes: of a rank's memory that it takes.
    """

    name: str
    points: Points
    link: WireFigures | None
    hidden: float
    pieces: bool = False
    rank_bytes: float = 0.0

    def alone_us(self, size: int) -> float:
        """Of one with `size` bytes, one behind the other."""
        return max(_interpolated(self.points, size), 0.0) + (self.link.floor_us(size) if self.link else 0.0)

    def exposed_us(self, size: int) -> float:
        """What a step waits for one with `size` bytes."""
        return self.alone_us(size) * (1 - self.hidden) + (GRAPH_PIECE_US if self.pieces else 0.0)


NCCL_BYTES = 3.4e9
"""Of NCCL's communicators for each rank (local-inference-lab/b12x)."""

GRAPH_PIECE_US = 2.5
"""Of the launch of one more graph: an empty one on a GB10 (flash7777/vllm-marlin-sm12x, PROFILING)."""

OWN_POINTS: Points = (
    (1 * KIB, 4.6),
    (4 * KIB, 5.2),
    (8 * KIB, 5.9),
    (10 * KIB, 6.4),
    (16 * KIB, 7.4),
    (32 * KIB, 9.3),
    (64 * KIB, 10.2),
    (128 * KIB, 11.2),
    (480 * KIB, 16.3),
    (2 * MIB, 16.6),
    (8 * MIB, 40.0),
    (32 * MIB, 66.0),
)
"""What this project's collectives add to the link's own time: `wire` less `floor` of benchmarks/NOTES.md, entry 17, two
H200 with the proxy and the modelled link. A GB10, whose proxy reads the same memory as its GPU, may need less."""

DIRECT_POINTS: Points = (
    (1 * KIB, 3.5),
    (4 * KIB, 3.5),
    (8 * KIB, 3.8),
    (16 * KIB, 4.3),
    (32 * KIB, 4.9),
    (64 * KIB, 6.5),
    (128 * KIB, 9.4),
    (480 * KIB, 25.1),
    (1 * MIB, 40.9),
)
"""The same between two H200 of one host without a link (entry 17)."""

MODELLED_WIRE_POINTS: Points = ((1 * KIB, 7.2), (4 * KIB, 8.3), (8 * KIB, 11.9), (16 * KIB, 15.1), (64 * KIB, 21.4))
"""The same over an earlier modelled link, when whole decode steps were measured over it (entry 13)."""

NCCL_H200_POINTS: Points = (
    (1 * KIB, 20.1),
    (4 * KIB, 21.6),
    (8 * KIB, 22.1),
    (16 * KIB, 22.5),
    (64 * KIB, 28.0),
    (256 * KIB, 50.0),
    (1 * MIB, 74.9),
)
"""NCCL 2.28.9 over host memory between two H200, in a graph (entry 13)."""

NCCL_GRAPH_POINTS: Points = (
    (4 * KIB, 45.6),
    (8 * KIB, 51.5),
    (60 * KIB, 83.9),
    (480 * KIB, 115.9),
    (2 * MIB, 198.5),
)
"""NCCL in a CUDA graph between two GB10: 4 KiB by flash7777/vllm-marlin-sm12x, 97 in a graph; more by
christopherowen/dgx-spark-networking, 256 in a graph, middles of ranges."""

NCCL_EAGER_POINTS: Points = ((4 * KIB, 19.0), (8 * KIB, 20.3), (16 * KIB, 21.5), (32 * KIB, 28.3))
"""NCCL outside of graphs between two GB10 (flash7777/vllm-marlin-sm12x, PROFILING)."""

OWN_HIDDEN, NCCL_HIDDEN = 0.08, 0.5
"""Shares of a collective that a step does not wait for, two H200: of ours 3.3 of 3.5 us direct and 7.6 of 8.3 us over
the modelled wire are in the step's kernels, of NCCL's 21.6 us 10.7 and 9.3 (entry 13)."""


def over_the_cable(link: WireFigures = PUBLISHED_FIGURES) -> Collectives:
    """This project's collectives between two machines with this link."""
    return Collectives("vllm_spark", OWN_POINTS, link, OWN_HIDDEN)


NCCL = Collectives("NCCL", NCCL_GRAPH_POINTS, None, NCCL_HIDDEN, rank_bytes=NCCL_BYTES)
"""NCCL as vLLM uses it between two GB10, in CUDA graphs."""

NCCL_EAGER = Collectives("NCCL outside of graphs", NCCL_EAGER_POINTS, None, 0.0, pieces=True, rank_bytes=NCCL_BYTES)
"""The same as flash7777 changed vLLM."""

DIRECT = Collectives("vllm_spark, direct", DIRECT_POINTS, None, OWN_HIDDEN)
"""This project's between two H200 of one host."""

MODELLED_WIRE = Collectives("vllm_spark, modelled wire", MODELLED_WIRE_POINTS, None, OWN_HIDDEN)
"""The same through the proxy and an earlier modelled link."""

NCCL_H200 = Collectives("NCCL over host memory", NCCL_H200_POINTS, None, NCCL_HIDDEN, rank_bytes=NCCL_BYTES)
"""NCCL as two machines would have it, between two H200 of one host."""


def fixed(microseconds: float) -> Collectives:
    """Collectives that take this long in a step, whatever their size."""
    return Collectives(f"{microseconds:g} us each", ((1, microseconds), (2, microseconds)), None, 0.0)


def _interpolated(points: Points, size: int) -> float:
    """Linear between points; below the first its time, above the last along the last two."""
    if size <= points[0][0]:
        return points[0][1]
    index = next((index for index, (bound, _) in enumerate(points) if size <= bound), len(points) - 1)
    (less, before), (more, after) = points[index - 1], points[index]
    return before + (after - before) * (size - less) / (more - less)
