"""The wire model: what `bench wire` writes is what the loopback transport reads, and nothing else passes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_spark.collective.link_model import (
    FIT_FROM,
    FIT_TO,
    PUBLISHED_FIGURES,
    PUBLISHED_LATENCY,
    PUBLISHED_POSTING,
    PUBLISHED_RAIL,
    Bandwidth,
    Latency,
    Posting,
    RailFigures,
    WireFigures,
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


# As `bench wire` writes it: without `posting`, which earlier versions refuse.
EARLIER_FILE = """
{
 "format": "vllm-spark wire 1",
 "provenance": "vllm-spark bench wire between one and other",
 "measured_at": "2026-03-04T05:06:07Z",
 "machines": ["one", "other"],
 "versions": {"vllm_spark": "0.1.0"},
 "rails": [
  {
   "latency": [
    {"bytes": 8, "minimum": 1.7, "median": 1.8, "p99": 2.0, "p999": 3.0},
    {"bytes": 16, "minimum": 1.6, "median": 1.75, "p99": 2.0, "p999": 3.0},
    {"bytes": 4096, "minimum": 3.0, "median": 3.2, "p99": 4.0, "p999": 5.0}
   ],
   "bandwidth": [{"bytes": 4096, "median": 11.0, "best": 11.5}, {"bytes": 1048576, "median": 12.5, "best": 12.6}],
   "fit": {"latency_us": 3.0, "gbytes_per_s": 12.5, "largest_error": 0.1},
   "devices": ["mlx5_0:1", "mlx5_0:1"],
   "mtu": 4096
  },
  {
   "latency": [{"bytes": 4096, "minimum": 3.0, "median": 3.3, "p99": 4.0, "p999": 5.0}],
   "bandwidth": [{"bytes": 1048576, "median": 12.0, "best": 12.6}],
   "fit": {"latency_us": 3.0, "gbytes_per_s": 12.0, "largest_error": 0.0},
   "devices": ["mlx5_1:1", "mlx5_1:1"],
   "mtu": 4096
  }
 ],
 "total": {
  "latency": [{"bytes": 4096, "minimum": 3.0, "median": 3.1, "p99": 4.0, "p999": 5.0}],
  "bandwidth": [{"bytes": 1048576, "median": 23.0, "best": 23.5}],
  "fit": {"latency_us": 3.0, "gbytes_per_s": 23.0, "largest_error": 0.0}
 }
}
"""


def test_an_earlier_file_gives_figures_too(tmp_path: Path) -> None:
    path = tmp_path / "wire.json"
    path.write_text(EARLIER_FILE)
    model = load_wire_model(path)
    figures = model.figures()
    # 16 bytes were measured as faster than 8, which is noise.
    assert figures.rails[0].latency == ((8, 1.8), (16, 1.8), (4096, 3.2))
    assert figures.rails[1].latency == ((4096, 3.3),)
    assert [rail.gbytes_per_s for rail in figures.rails] == [12.5, 12.0]
    assert figures.gbytes_per_s == 23.0
    assert figures.posting == PUBLISHED_POSTING
    store_wire_model(model, path)
    assert json.loads(path.read_text()) == json.loads(EARLIER_FILE), "earlier versions can read what is written now"


def test_costs_of_posting_may_be_added_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "wire.json"
    path.write_text(changed("posting", value={"doorbell_us": 0.5, "work_request_us": 0.1}))
    model = load_wire_model(path)
    assert model.figures().posting == Posting(doorbell_us=0.5, work_request_us=0.1)
    store_wire_model(model, path)
    assert load_wire_model(path) == model


def test_the_published_figures() -> None:
    """One rail takes what `ib_write_lat` reported, both have the bandwidth of the port, and a chain of two 0.3 us."""
    assert [rail.gbytes_per_s for rail in PUBLISHED_FIGURES.rails] == [11.7, 11.7]
    assert all(rail.latency == PUBLISHED_LATENCY for rail in PUBLISHED_FIGURES.rails)
    assert sum(rail.gbytes_per_s for rail in PUBLISHED_FIGURES.rails) <= PUBLISHED_FIGURES.gbytes_per_s == 24.0
    (_, before), (_, last) = PUBLISHED_LATENCY[-2:]
    rest = PUBLISHED_LATENCY[-1][0] - PUBLISHED_LATENCY[-2][0]
    assert rest / (last - before) / 1e3 == pytest.approx(PUBLISHED_RAIL.gbytes_per_s, rel=0.01), "one rail alone"
    posting = PUBLISHED_FIGURES.posting
    assert posting.doorbell_us + 2 * posting.work_request_us == pytest.approx(0.3)


def test_a_straight_line_is_one_rail() -> None:
    figures = WireFigures.alpha_beta(3.2, 24.0)
    assert figures.rails == (RailFigures(latency=((0, 3.2),), gbytes_per_s=24.0),)
    assert (figures.gbytes_per_s, figures.posting) == (0.0, Posting(doorbell_us=0, work_request_us=0))


RAIL = {"latency": [[2, 1.7], [4096, 3.2]], "gbytes_per_s": 11.7}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"rails": []}, "rails"),
        ({"rails": [RAIL] * 5}, "rails"),
        ({"rails": [{**RAIL, "latency": []}]}, "latency"),
        ({"rails": [{**RAIL, "latency": [[4096, 3.2], [4096, 3.2]]}]}, "not in ascending order: 4096, 4096"),
        ({"rails": [{**RAIL, "latency": [[2, 3.2], [4096, 1.7]]}]}, "4096 bytes take 1.7 us, less than 2 bytes"),
        ({"rails": [{**RAIL, "latency": [[2, -1]]}]}, "greater than or equal to 0"),
        ({"rails": [{**RAIL, "gbytes_per_s": math.inf}]}, "finite number"),
        ({"rails": [RAIL, {**RAIL, "gbytes_per_s": 0}], "gbytes_per_s": 24}, "limited together"),
        ({"rails": [RAIL], "posting": {"doorbell_us": -1, "work_request_us": 0}}, "doorbell_us"),
    ],
)
def test_figures_of_no_link(content: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError, match=part):
        WireFigures.model_validate(content)


def test_the_floor_of_the_link() -> None:
    """Small sizes: half of them over each rail. Large ones: the bandwidth of both."""
    floor = PUBLISHED_FIGURES.floor_us
    assert floor(2) == pytest.approx(1.74, rel=1e-3)
    assert floor(8 << 10) == pytest.approx(3.19)
    assert floor(64 << 10) == pytest.approx(6.69)
    assert floor(32 << 20) == pytest.approx(1.74 + (32 << 20) / 23.4e3)
    limited = PUBLISHED_FIGURES.model_copy(update={"gbytes_per_s": 11.7})
    assert limited.floor_us(32 << 20) == pytest.approx(1.74 + (32 << 20) / 11.7e3)
    assert WireFigures.alpha_beta(3.0, 10.0).floor_us(10_000) == pytest.approx(4.0)
    assert WireFigures.alpha_beta(3.0, 0.0).floor_us(1 << 20) == 3.0
