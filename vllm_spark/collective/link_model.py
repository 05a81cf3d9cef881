"""Models of a link between two machines, as `vllm-spark bench wire` measured it, or as others published it.

Options and files call the result of `bench wire` a wire model; it is a JSON file (`WireModel`). Two models of the
link's time are made of it. Bytes are those on the wire: the LL protocol sends 16 for each 8 bytes of data, the Simple
protocol 8 more for the flag.

**Figures** (`WireFigures`) are what csrc/transport/wire_model.hpp computes with: for each rail a curve of one-way
latencies over the size of a write, linear in between, and a bandwidth; the bandwidth of all rails together; and what
posting writes costs the processor. Writes share a rail's bandwidth one after the other.

**The alpha-beta (Hockney) model** (`Fit`) is one straight line for the whole link:

    time = latency + bytes / bandwidth

A real link is not linear: a short message costs more per byte than a long one, because it is stored and forwarded on
its way, and messages in flight overlap in that. So each number is fitted to the sizes for which it matters:

- bandwidth: the highest median of writes posted back to back, of all measured sizes. It determines the time of large
  messages.
- latency: fitted to the measured one-way medians less bytes / bandwidth, with the smallest relative errors at 1 KiB to
  64 KiB (least squares), the sizes of a decode step's messages; to all sizes if none of these was measured.

`largest_error` is the relative error at the worst of these sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_spark.errors import ConfigurationError
from vllm_spark.files import TABLE_FILE, atomic_write_text, read_regular
from vllm_spark.records import first_fault

FIT_FROM, FIT_TO = 1 << 10, 64 << 10
"""Sizes in bytes for which the latency is fitted."""

_FIGURES_FORMAT = "vllm-spark wire figures 1"
_REMEDY = "write one: vllm-spark bench wire --output FILE"

Bytes = Annotated[int, Field(ge=1, le=64 << 20)]
Microseconds = Annotated[float, Field(gt=0, le=1e9)]
GBytesPerSecond = Annotated[float, Field(gt=0, le=1e4)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Latency(_Part):
    """One-way latency in microseconds: half of a round trip of RDMA writes of this size."""

    bytes: Bytes
    minimum: Microseconds
    median: Microseconds
    p99: Microseconds
    p999: Microseconds

    @model_validator(mode="after")
    def _in_order(self) -> Latency:
        if not self.minimum <= self.median <= self.p99 <= self.p999:
            raise ValueError(
                f"minimum {self.minimum:g}, median {self.median:g}, p99 {self.p99:g} and p999 {self.p999:g} "
                "are not in order"
            )
        return self


class Bandwidth(_Part):
    """Bandwidth of RDMA writes of this size, posted back to back, in GB/s (10^9 bytes)."""

    bytes: Bytes
    median: GBytesPerSecond
    best: GBytesPerSecond

    @model_validator(mode="after")
    def _in_order(self) -> Bandwidth:
        if self.median > self.best:
            raise ValueError(f"the median {self.median:g} is more than the best {self.best:g}")
        return self


class Fit(_Part):
    """The fitted model: `latency_us + bytes / gbytes_per_s`."""

    latency_us: Annotated[float, Field(ge=0, le=1e6)]
    gbytes_per_s: GBytesPerSecond
    largest_error: Annotated[float, Field(ge=0)] = 0.0
    """Largest relative error at the sizes to which it was fitted: 0.1 is 10 %."""


CABLE = Fit(latency_us=3.2, gbytes_per_s=24.0)
"""The assumed cable between two GB10 without a measurement: 4 KiB one way between two DGX Spark, and 200 Gb/s."""


class RailFigures(_Part):
    """One rail of the figures, in one direction."""

    latency: Annotated[
        tuple[tuple[Annotated[int, Field(ge=0, le=64 << 20)], Annotated[float, Field(ge=0, le=1e9)]], ...],
        Field(min_length=1),
    ]
    """Bytes of a write, and its one-way latency over an idle rail in microseconds; both ascend. Smaller writes take the
    first latency, larger ones the last and the rest of their bytes over the bandwidth."""
    gbytes_per_s: Annotated[float, Field(ge=0, le=1e4)]
    """Of writes posted back to back; 0: unlimited."""

    def latency_us(self, size: float) -> float:
        """One-way latency in microseconds of one write of `size` bytes over the idle rail."""
        before = self.latency[0]
        if size <= before[0]:
            return before[1]
        for point in self.latency[1:]:
            if size < point[0]:
                return before[1] + (size - before[0]) / (point[0] - before[0]) * (point[1] - before[1])
            before = point
        return before[1] + ((size - before[0]) / self.gbytes_per_s / 1e3 if self.gbytes_per_s else 0.0)

    @model_validator(mode="after")
    def _ascends(self) -> RailFigures:
        for (smaller, before), (larger, after) in pairwise(self.latency):
            if smaller >= larger:
                raise ValueError(f"the sizes of the latencies are not in ascending order: {smaller}, {larger}")
            if before > after:
                raise ValueError(f"{larger} bytes take {after:g} us, less than {smaller} bytes, which take {before:g}")
        return self


class Posting(_Part):
    """The processor's time for posting writes, in microseconds."""

    doorbell_us: Annotated[float, Field(ge=0, le=1e3)]
    """For each chain of writes."""
    work_request_us: Annotated[float, Field(ge=0, le=1e3)]
    """And for each write of it."""


class WireFigures(_Part):
    """What the modelled link computes with (csrc/transport/wire_model.hpp). Also the content of a file."""

    format: Literal["vllm-spark wire figures 1"] = "vllm-spark wire figures 1"
    rails: Annotated[tuple[RailFigures, ...], Field(min_length=1, max_length=4)]
    gbytes_per_s: Annotated[float, Field(ge=0, le=1e4)] = 0.0
    """Of all rails together, which each rail has a share of; 0: the sum of the rails'."""
    posting: Posting = Posting(doorbell_us=0, work_request_us=0)

    @model_validator(mode="after")
    def _limited(self) -> WireFigures:
        if self.gbytes_per_s and not all(rail.gbytes_per_s for rail in self.rails):
            raise ValueError("rails that are limited together need a bandwidth each, and one has 0")
        return self

    @property
    def summary(self) -> str:
        """The figures in a few words, for the captions of benchmarks: each rail's least latency and bandwidth."""
        rails = dict.fromkeys(f"{rail.latency[0][1]:g} us and {rail.gbytes_per_s:g} GB/s" for rail in self.rails)
        words = " or ".join(rails)
        if len(self.rails) > 1:
            words = f"{len(self.rails)} rails of {words} each"
        return f"{words}, {self.gbytes_per_s:g} GB/s together" if self.gbytes_per_s else words

    def floor_us(self, size: int) -> float:
        """Least time in microseconds of `size` bytes over the link alone: what no collective is below.

        Each rail takes a share in proportion to its bandwidth, and the slowest one counts. A share takes at least as
        long as one write of it over an idle rail, and as the least latency and its bytes over the rail's bandwidth
        while all are busy, as one collective after the other keeps them.
        """
        total = sum(rail.gbytes_per_s for rail in self.rails)

        def time(rail: RailFigures) -> float:
            share = size * (rail.gbytes_per_s / total if total else 1 / len(self.rails))
            busy = rail.gbytes_per_s * min(1.0, self.gbytes_per_s / total if self.gbytes_per_s else 1.0)
            least = rail.latency[0][1]
            return max(rail.latency_us(share), least + share / busy / 1e3 if busy else least)

        return max(time(rail) for rail in self.rails)

    @classmethod
    def alpha_beta(cls, latency_us: float, gbytes_per_s: float) -> WireFigures:
        """The alpha-beta model as one rail without costs of posting; 0 GB/s: unlimited."""
        return cls(rails=(RailFigures(latency=((0, latency_us),), gbytes_per_s=gbytes_per_s),))


PUBLISHED_LATENCY = (
    (2, 1.74),
    (1 << 10, 2.59),
    (4 << 10, 3.19),
    (8 << 10, 3.78),
    (16 << 10, 4.83),
    (32 << 10, 6.69),
    (1 << 20, 82.2),
)
"""`ib_write_lat` between two GB10 (DGX Spark and ThinkStation PGX, ConnectX-7, one QSFP56 cable), one way, memory of
the CPU: bytes and microseconds. Source: the repository flash7777/vllm-marlin-sm12x, early in 2026."""

PUBLISHED_POSTING = Posting(doorbell_us=0.24, work_request_us=0.03)
"""The sum is published there: 0.3 us for posting two chained writes on a GB10. How much of it is the doorbell is
assumed: a further write of a chain is 64 bytes more of the queue in memory, and the doorbell a store to the device
between barriers."""

PUBLISHED_RAIL = RailFigures(latency=PUBLISHED_LATENCY, gbytes_per_s=13.4)
"""One rail while the other is idle, as `ib_write_lat` was measured: from 32 KiB to 1 MiB, further bytes take 75.5 us,
which is 13.4 GB/s."""

PUBLISHED_FIGURES = WireFigures(
    rails=(RailFigures(latency=PUBLISHED_LATENCY, gbytes_per_s=11.7),) * 2,
    gbytes_per_s=24.0,
    posting=PUBLISHED_POSTING,
)
"""The assumed link between two GB10 without a measurement. Bandwidth: `ib_write_bw` over the two PCIe functions of one
port at the same time, 92.6 and 97.3 Gb/s, which are 11.6 and 12.2 GB/s (NVIDIA's dgx-spark-playbooks,
connect-two-sparks); 24 GB/s is what the port and its cable have. That is less than a rail has alone, and the model has
one bandwidth for a rail: that while both are busy, since large messages go over both. So a single write of 1 MiB takes
the 82 us of `ib_write_lat`, but what is posted after it waits for the rail until 90 us."""


class Wire(_Part):
    """The measurements over one rail, or over all of them together."""

    latency: Annotated[tuple[Latency, ...], Field(min_length=1)]
    bandwidth: Annotated[tuple[Bandwidth, ...], Field(min_length=1)]
    fit: Fit

    @model_validator(mode="after")
    def _sizes_rise(self) -> Wire:
        for name, points in (("latency", self.latency), ("bandwidth", self.bandwidth)):
            sizes = [point.bytes for point in points]
            if sizes != sorted(set(sizes)):
                raise ValueError(f"the sizes of {name} are not in ascending order: {', '.join(map(str, sizes))}")
        return self


class RailWire(Wire):
    """One rail."""

    devices: tuple[str, str]
    """RDMA device and port of each machine: `mlx5_0:1`."""
    mtu: Annotated[int, Field(ge=256, le=4096)]
    """Bytes of payload in one packet."""


class WireModel(_Part):
    """The content of the file."""

    format: Literal["vllm-spark wire 1"] = "vllm-spark wire 1"
    provenance: str
    """The method and the machines of the measurement, as text."""
    measured_at: datetime
    machines: tuple[str, str]
    versions: dict[str, str]
    rails: Annotated[tuple[RailWire, ...], Field(min_length=1, max_length=4)]
    total: Wire
    """All rails together."""
    posting: Posting | None = None
    """Processor's time for posting writes; None: the published one. `bench wire` does not measure it: it posts from
    another place than a proxy does. It may be added to the file."""

    def figures(self) -> WireFigures:
        """The figures of this link: latencies are the medians, and bandwidths the highest medians.

        A median that is less than that of a smaller write, as noise makes it, counts as much as that one.
        """

        def best(wire: Wire) -> float:
            return max(point.median for point in wire.bandwidth)

        def curve(rail: Wire) -> tuple[tuple[int, float], ...]:
            medians = accumulate((point.median for point in rail.latency), max)
            return tuple(zip((point.bytes for point in rail.latency), medians, strict=True))

        return WireFigures(
            rails=tuple(RailFigures(latency=curve(rail), gbytes_per_s=best(rail)) for rail in self.rails),
            gbytes_per_s=best(self.total),
            posting=self.posting or PUBLISHED_POSTING,
        )


def fit(latency: Sequence[Latency], bandwidth: Sequence[Bandwidth]) -> Fit:
    """The model for these points, at least one of each kind; the module's docstring describes the fit."""
    gbytes_per_s = max(point.median for point in bandwidth)
    points = [point for point in latency if FIT_FROM <= point.bytes <= FIT_TO] or list(latency)
    on_wire = [point.bytes / gbytes_per_s / 1e3 for point in points]
    weights = [point.median**-2 for point in points]
    rest = sum(w * (point.median - time) for w, point, time in zip(weights, points, on_wire, strict=True))
    latency_us = max(0.0, rest / sum(weights))
    errors = [abs(latency_us + time - point.median) / point.median for point, time in zip(points, on_wire, strict=True)]
    return Fit(latency_us=latency_us, gbytes_per_s=gbytes_per_s, largest_error=max(errors))


def load_wire_model(path: Path) -> WireModel:
    """Reads and checks a wire model.

    Raises:
        ConfigurationError: the file does not exist, or is not a wire model; the sentence names the field.
    """
    return _parse(WireModel, _read(path), path)


def load_wire_figures(path: Path) -> WireFigures:
    """Reads and checks the figures of a wire model, or a file of figures alone.

    Raises:
        ConfigurationError: the file does not exist, or is neither; the sentence names the field.
    """
    content = _read(path)
    if _FIGURES_FORMAT.encode() in content:
        return _parse(WireFigures, content, path)
    return _parse(WireModel, content, path).figures()


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, TABLE_FILE)
    except OSError as error:
        raise ConfigurationError(f"the wire model {path} cannot be read ({error.strerror}); {_REMEDY}") from None


_File = TypeVar("_File", WireModel, WireFigures)


def _parse(kind: type[_File], content: bytes, path: Path) -> _File:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise ConfigurationError(f"the wire model {path} is invalid: {first_fault(error)}; {_REMEDY}") from None


def store_wire_model(model: WireModel | WireFigures, path: Path) -> None:
    """Writes `model` to `path` atomically.

    Raises:
        ConfigurationError: it cannot be written.
    """
    atomic_write_text(path, model.model_dump_json(indent=1, exclude_none=True) + "\n", "wire model")
