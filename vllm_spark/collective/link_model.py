"""The alpha-beta (Hockney) model of a link between two machines, as `vllm-spark bench wire` measured it.

Options and files call it a wire model; it is a JSON file. The loopback transport uses the two numbers of `total.fit`:

    time = latency + bytes / bandwidth

where bytes are those on the wire: the LL protocol sends 16 for each 8 bytes of data, the Simple protocol 8 more for the
flag. Messages share the bandwidth one after the other, and each has the latency.

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
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_spark.errors import ConfigurationError
from vllm_spark.files import TABLE_FILE, atomic_write_text, read_regular
from vllm_spark.records import first_fault

FIT_FROM, FIT_TO = 1 << 10, 64 << 10
"""Sizes in bytes for which the latency is fitted."""

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
    """All rails together: the link that the loopback transport models."""


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
    try:
        content = read_regular(path, TABLE_FILE)
    except OSError as error:
        raise ConfigurationError(f"the wire model {path} cannot be read ({error.strerror}); {_REMEDY}") from None
    try:
        return WireModel.model_validate_json(content)
    except ValidationError as error:
        raise ConfigurationError(f"the wire model {path} is invalid: {first_fault(error)}; {_REMEDY}") from None


def store_wire_model(model: WireModel, path: Path) -> None:
    """Writes `model` to `path` atomically.

    Raises:
        ConfigurationError: it cannot be written.
    """
    atomic_write_text(path, model.model_dump_json(indent=1) + "\n", "wire model")
