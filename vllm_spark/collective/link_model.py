"""A wire between two machines, as `vllm-spark bench wire` measured it: a JSON file.

The loopback transport takes two numbers from it, those of `total.fit`. Its model of a wire is

    time = latency + bytes / bandwidth

where bytes are those on the wire: the transport itself counts 16 for each 8 of a flagged packet, and 8 for the flag
behind a payload. Messages queue for the bandwidth, and the latency is that of each alone.

A real wire is no such line: a short message costs more for each byte than a long one, since it is stored and forwarded
on its way, and many under way share that. So each number is fitted where it counts:

- bandwidth: the highest that writes posted back to back reached, of the sizes that were measured. It decides how
  long large messages take.
- latency: what is left of the measured one-way medians when bytes / bandwidth is taken off, so that the relative
  errors of the line at 1 KiB to 64 KiB are smallest (least squares). These are the sizes of a decode step's messages.
  Without a measured size among them, all count.

`largest_error` says how far the line is off at the worst of these sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_spark.errors import ConfigurationError
from vllm_spark.files import atomic_write_text, first_fault

FIT_FROM, FIT_TO = 1 << 10, 64 << 10
"""Bytes of the messages for which the latency is fitted."""

_REMEDY = "write one: vllm-spark bench wire --output FILE"

Bytes = Annotated[int, Field(ge=1, le=64 << 20)]
Microseconds = Annotated[float, Field(gt=0, le=1e9)]
GBytesPerSecond = Annotated[float, Field(gt=0, le=1e4)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Latency(_Part):
    """One way, in microseconds: half of a round trip of RDMA writes of this size."""

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
    """Of RDMA writes of this size, posted back to back, in GB/s (10^9 bytes)."""

    bytes: Bytes
    median: GBytesPerSecond
    best: GBytesPerSecond

    @model_validator(mode="after")
    def _in_order(self) -> Bandwidth:
        if self.median > self.best:
            raise ValueError(f"the median {self.median:g} is more than the best {self.best:g}")
        return self


class Fit(_Part):
    """The line that stands for a wire: `latency_us + bytes / gbytes_per_s`."""

    latency_us: Annotated[float, Field(ge=0, le=1e6)]
    gbytes_per_s: GBytesPerSecond
    largest_error: Annotated[float, Field(ge=0)] = 0.0
    """Of the line, at the measured sizes that it was fitted to: 0.1 is 10 %."""


CABLE = Fit(latency_us=3.2, gbytes_per_s=24.0)
"""The cable between two GB10 where nothing was measured: 4 KiB one way between two DGX Spark, and 200 Gb/s."""


class Wire(_Part):
    """What was measured over one rail, or over all of them together."""

    latency: Annotated[tuple[Latency, ...], Field(min_length=1)]
    bandwidth: Annotated[tuple[Bandwidth, ...], Field(min_length=1)]
    fit: Fit

    @model_validator(mode="after")
    def _sizes_rise(self) -> Wire:
        for name, points in (("latency", self.latency), ("bandwidth", self.bandwidth)):
            sizes = [point.bytes for point in points]
            if sizes != sorted(set(sizes)):
                raise ValueError(f"the sizes of {name} do not rise: {', '.join(map(str, sizes))}")
        return self


class RailWire(Wire):
    """One rail."""

    devices: tuple[str, str]
    """RDMA device and port of each machine: `mlx5_0:1`."""
    mtu: Annotated[int, Field(ge=256, le=4096)]
    """Bytes of payload in one packet."""


class WireModel(_Part):
    """The whole file."""

    format: Literal["vllm-spark wire 1"] = "vllm-spark wire 1"
    provenance: str
    """How and between which machines it was measured, for people."""
    measured_at: datetime
    machines: tuple[str, str]
    versions: dict[str, str]
    rails: Annotated[tuple[RailWire, ...], Field(min_length=1, max_length=4)]
    total: Wire
    """All rails together: what the loopback transport stands for."""


def fit(latency: Sequence[Latency], bandwidth: Sequence[Bandwidth]) -> Fit:
    """The line for these points, of which each sequence has at least one; see above for what is fitted to which."""
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
        ConfigurationError: the file is not there, or holds something else; the sentence says where and what.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"the wire model {path} cannot be read ({error.strerror}); {_REMEDY}") from None
    try:
        return WireModel.model_validate_json(content)
    except ValidationError as error:
        raise ConfigurationError(f"the wire model {path} does not do ({first_fault(error)}); {_REMEDY}") from None


def store_wire_model(model: WireModel, path: Path) -> None:
    """Writes `model` to `path`, whole or not at all.

    Raises:
        ConfigurationError: it cannot be written.
    """
    atomic_write_text(path, model.model_dump_json(indent=1) + "\n", "wire model")
