"""The wire model: what `bench wire` writes is what the loopback transport reads, and nothing else passes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_spark.collective.link_model import (
    FIT_FROM,
    FIT_TO,
    Bandwidth,
    Latency,
    fit,
    load_wire_model,
    store_wire_model,
)
from vllm_spark.errors import ConfigurationError

from .wires import wire_model

SIZES = [1 << power for power in range(1, 23)]


def latency(size: int, median: float) -> Latency:
    return Latency(bytes=size, minimum=median / 2, median=median, p99=median, p999=2 * median)


def bandwidth(size: int, gbytes_per_s: float) -> Bandwidth:
    return Bandwidth(bytes=size, median=gbytes_per_s, best=2 * gbytes_per_s)


@given(
    st.floats(0.01, 1e4),
    st.floats(0.01, 1e3),
    st.lists(st.sampled_from(SIZES), min_size=1, unique=True),
    st.lists(st.sampled_from(SIZES), min_size=1, unique=True),
)
def test_a_wire_that_is_a_line_is_found_again(
    latency_us: float, gbytes_per_s: float, latency_sizes: list[int], bandwidth_sizes: list[int]
) -> None:
    points = [latency(size, latency_us + size / gbytes_per_s / 1e3) for size in latency_sizes]
    # Small writes do not fill a wire: the highest counts.
    rates = [bandwidth(size, gbytes_per_s / (1 + index)) for index, size in enumerate(bandwidth_sizes)]
    found = fit(points, rates)
    assert found.gbytes_per_s == gbytes_per_s
    # What is left of a long message's time when the bandwidth's part is taken off has lost digits.
    assert found.latency_us == pytest.approx(latency_us, abs=1e-12 * max(point.median for point in points) + 1e-9)
    assert found.largest_error == pytest.approx(0, abs=1e-6)


@given(
    st.lists(st.tuples(st.sampled_from(SIZES), st.floats(0.1, 1e5)), min_size=1, unique_by=lambda point: point[0]),
    st.floats(0.01, 1e3),
)
def test_no_other_latency_has_smaller_relative_errors(points: list[tuple[int, float]], gbytes_per_s: float) -> None:
    found = fit([latency(size, time) for size, time in points], [bandwidth(4096, gbytes_per_s)])
    counted = [point for point in points if FIT_FROM <= point[0] <= FIT_TO] or points

    def errors(latency_us: float) -> list[float]:
        return [(latency_us + size / gbytes_per_s / 1e3 - time) / time for size, time in counted]

    def cost(latency_us: float) -> float:
        return math.fsum(error**2 for error in errors(latency_us))

    assert found.latency_us >= 0
    assert found.largest_error == pytest.approx(max(map(abs, errors(found.latency_us))))
    for step in (1e-3, 0.1, 1.0):
        for other in (found.latency_us * (1 + step) + step, max(0.0, found.latency_us * (1 - step) - step)):
            assert cost(found.latency_us) <= cost(other) * (1 + 1e-9)


def test_only_the_sizes_of_decode_steps_count() -> None:
    points = [latency(2, 1.0), latency(4096, 3.0), latency(1 << 20, 500.0)]
    assert fit(points, [bandwidth(4096, 4.096)]).latency_us == pytest.approx(2.0)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    model, path = wire_model(), tmp_path / "wire.json"
    store_wire_model(model, path)
    assert load_wire_model(path) == model
    assert [file.name for file in tmp_path.iterdir()] == ["wire.json"]
    with pytest.raises(ConfigurationError, match=r"the wire model /proc/nowhere/wire\.json cannot be written"):
        store_wire_model(model, Path("/proc/nowhere/wire.json"))


def changed(*keys: Any, value: Any) -> str:
    """The file, with another value at the place that `keys` lead to."""
    content: Any = json.loads(wire_model().model_dump_json())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "invalid JSON"),
        ("[]", "input should be an object"),
        ("{}", "provenance: field required"),
        ('{"latency_us": 3}', "required"),
        (changed("format", value="vllm-spark wire 2"), "format: input should be 'vllm-spark wire 1'"),
        (changed("more", value=1), "more: extra inputs"),
        (changed("rails", value=[]), "rails: tuple should have at least 1 item"),
        (changed("total", "fit", "latency_us", value=-1), "total.fit.latency_us: input should be greater than"),
        (changed("total", "fit", "gbytes_per_s", value=0), "total.fit.gbytes_per_s: input should be greater than 0"),
        (changed("total", "fit", "latency_us", value=math.nan), "total.fit.latency_us: input should be a finite"),
        (changed("total", "latency", 0, "median", value=9.0), "total.latency.0: minimum 3, median 9, p99 4"),
        (changed("total", "bandwidth", 0, "best", value=1.0), "the median 24 is more than the best 1"),
        (changed("rails", 0, "mtu", value=9000), "rails.0.mtu: input should be less than or equal to 4096"),
        (
            changed("total", "latency", value=[wire_model().total.latency[0].model_dump()] * 2),
            "total: the sizes of latency are not in ascending order: 4096, 4096",
        ),
    ],
)
def test_other_content(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "wire.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        load_wire_model(path)
    assert part in str(caught.value)
    assert str(path) in str(caught.value)
    assert "vllm-spark bench wire" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigurationError, match=f"the wire model {path} cannot be read"):
            load_wire_model(path)
    (tmp_path / "noise").write_bytes(b"\xff\x00")
    with pytest.raises(ConfigurationError, match="is invalid: "):
        load_wire_model(tmp_path / "noise")
