"""Wire models for tests."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from vllm_spark.collective.link_model import Bandwidth, Fit, Latency, RailWire, Wire, WireModel, store_wire_model


def wire_model(latency_us: float = 3.0, gbytes_per_s: float = 24.0) -> WireModel:
    """One rail, with these two numbers as its fit."""
    measured = {
        "latency": (Latency(bytes=4096, minimum=3.0, median=3.2, p99=4.0, p999=5.0),),
        "bandwidth": (Bandwidth(bytes=1 << 20, median=24.0, best=24.5),),
        "fit": Fit(latency_us=latency_us, gbytes_per_s=gbytes_per_s),
    }
    return WireModel(
        provenance="made up for a test",
        measured_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc),
        machines=("one", "other"),
        versions={"vllm_spark": "0"},
        rails=(RailWire.model_validate({**measured, "devices": ("mlx5_0:1", "mlx5_1:1"), "mtu": 4096}),),
        total=Wire.model_validate(measured),
    )


def wire_file(path: Path, latency_us: float, gbytes_per_s: float) -> Path:
    """The same, in a file; returns its path."""
    store_wire_model(wire_model(latency_us, gbytes_per_s), path)
    return path
