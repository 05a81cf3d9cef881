"""The report of `vllm-spark bench wire` as tables, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_spark.bench.collective_report import format_size
from vllm_spark.bench.wire import Plan
from vllm_spark.collective.link_model import Bandwidth, Latency, Wire, WireModel
from vllm_spark.records import indented_json

ALL_RAILS = "all rails"


def named(model: WireModel) -> Iterator[tuple[str, Wire]]:
    """Every rail by name, and all of them together if there are several."""
    yield from ((f"rail {index}", rail) for index, rail in enumerate(model.rails))
    if len(model.rails) > 1:
        yield ALL_RAILS, model.total


def as_tables(plan: Plan, model: WireModel) -> list[Table]:
    """Tables of latency, bandwidth, and the fitted link model of the loopback transport."""
    latency = _by_size(
        "One way, microseconds: half a round trip of RDMA writes",
        ("minimum", "median", "p99", "p99.9"),
        model,
        lambda wire: wire.latency,
        lambda point: [_time(value) for value in (point.minimum, point.median, point.p99, point.p999)],
    )
    latency.caption = f"{plan.samples} round trips of each size"
    bandwidth = _by_size(
        "One direction, GB/s: RDMA writes posted back to back",
        ("median", "best", "Gbit/s"),
        model,
        lambda wire: wire.bandwidth,
        lambda point: [f"{point.median:.3g}", f"{point.best:.3g}", f"{8 * point.median:.4g}"],
    )
    bandwidth.caption = f"{plan.writes} writes of each size, {plan.depth} outstanding on each rail"
    line = Table(title="The wire as the loopback transport models it: latency + bytes / bandwidth")
    for heading in ("", "devices", "MTU", "latency, us", "GB/s", "largest error"):
        line.add_column(heading, justify="left" if heading in ("", "devices") else "right", no_wrap=True)
    rails = list(model.rails)
    for index, (name, wire) in enumerate(named(model)):
        ends = [" to ".join(rails[index].devices), str(rails[index].mtu)] if index < len(rails) else ["", ""]
        fit = wire.fit
        line.add_row(name, *ends, _time(fit.latency_us), f"{fit.gbytes_per_s:.3g}", f"{fit.largest_error:.0%}")
    line.caption = "; ".join(model.machines)
    return [latency, bandwidth, line]


def _by_size(
    title: str,
    headings: Sequence[str],
    model: WireModel,
    points_of: Callable[[Wire], Sequence[Any]],
    cells: Callable[[Any], list[str]],
) -> Table:
    table = Table(title=title)
    for heading in ("size", "", *headings):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for points in zip(*(points_of(wire) for _, wire in named(model)), strict=True):
        first = format_size(points[0].bytes)
        for (name, _), point in zip(named(model), points, strict=True):
            table.add_row(first, name, *cells(point))
            first = ""
        table.add_section()
    return table


def _time(microseconds: float) -> str:
    return f"{microseconds:.2f}" if microseconds < 100 else f"{microseconds:.0f}"


def as_json(plan: Plan, model: WireModel) -> str:
    """The plan and the wire model."""
    content = {"settings": plan, "wire": model.model_dump(mode="json")}
    return indented_json(content)


def plot(model: WireModel, path: Path) -> None:
    """Draws latency and bandwidth over sizes, and the fitted model, into `path`; the suffix chooses the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, wire in named(model):
        _draw(left, wire.latency, f"{name}, median")
        _draw(right, wire.bandwidth, name)
    sizes = [point.bytes for point in model.total.latency]
    fit = model.total.fit
    line = [fit.latency_us + size / fit.gbytes_per_s / 1e3 for size in sizes]
    left.plot(sizes, line, linestyle="--", color="black", label="as loopback models it")
    left.set_ylabel("microseconds, one way")
    left.set_yscale("log")
    right.set_ylabel("GB/s, one direction, median")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("bytes")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
    figure.suptitle("; ".join(model.machines), fontsize="small")
    figure.savefig(path)


def _draw(axes: Any, points: Sequence[Latency | Bandwidth], label: str) -> None:
    axes.plot([point.bytes for point in points], [point.median for point in points], marker="o", label=label)
