"""A benchmark's report as a table, as JSON and as a plot."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_spark.bench.collective import Report, shape_of
from vllm_spark.bench.machine_times import GB10_SOURCE, MachineTimes, on_gb10
from vllm_spark.bench.published import SOURCES, published_text
from vllm_spark.errors import ConfigurationError
from vllm_spark.records import indented_json

_SHORTEST_WORDS = 10  # characters
_UNITS = ((1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))


def format_size(size: int) -> str:
    """`4 KiB` for 4096."""
    unit, name = next((unit, name) for unit, name in _UNITS if (size % unit == 0 and size >= unit) or unit == 1)
    return f"{size // unit} {name}"


def as_table(report: Report, mode: str, peers: bool = False) -> Table:
    """One mode's figures, and their ratio to the last candidate's, which is the baseline over host memory.

    Args:
        report: what was measured.
        mode: `eager` or `graph`.
        peers: shows a GB10's times and what others published for pairs of GB10, in the place of the bandwidth.
    """
    baseline = report.rows[-1].candidate
    settings = report.settings
    table = Table(
        collapse_padding=True,
        title=f"{settings.collective} of bfloat16, {mode}, microseconds for one call",
        caption=f"{report.machine}. {baseline}: {report.baseline}. wire: proxied, the modelled link has "
        f"{settings.wire.summary}. Limit: share of a large copy's {report.copy_gbytes_per_s:.1f} GB/s. "
        f"Ratio: to {baseline}. Floor: the modelled link's own time. "
        "GB/s: bytes of a rank's input over the median."
        + ("".join(f" {name}: {source}." for name, source in SOURCES.items()) if peers else "")
        + (_gb10_caption(report.times) if peers and report.times is not None else ""),
    )
    headings = ["size", "", "median", "p99", "ratio", "floor"]
    headings += ["GB10", "published"] if peers else ["minimum", "GB/s", "limit"]
    for heading in headings:
        if heading in ("", "published"):  # words, which give way on a narrow screen
            table.add_column(heading, min_width=_SHORTEST_WORDS)
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for size in settings.sizes:
        first = format_size(size)
        if settings.collective == "logits_gather":
            first = str(list(shape_of(settings, size)))
        reference = report.median(baseline, mode, size)
        for row in report.rows:
            if (row.mode, row.bytes) != (mode, size):
                continue
            share = f"{row.gbytes_per_s / report.copy_gbytes_per_s:.0%}"
            ratio = "" if reference is None else f"{row.median / reference:.2f}"
            floor = gb10 = published = ""
            if row.candidate == "wire":
                floor, published = _time(settings.wire.floor_us(size)), published_text(size)
                if mode == "graph" and report.times is not None:
                    gb10 = _time(on_gb10(row.median, report.times))
            more = [gb10, published] if peers else [_time(row.minimum), f"{row.gbytes_per_s:.2f}", share]
            table.add_row(first, row.candidate, _time(row.median), _time(row.p99), ratio, floor, *more)
            first = ""
        table.add_section()
    return table


def _gb10_caption(times: MachineTimes) -> str:
    return (
        f" GB10: the median with a GB10's times in the place of this machine's ({times.round_trip:.2f} us and "
        f"{times.kernel:.2f} us; {GB10_SOURCE})."
    )


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:.0f}"


def as_json(report: Report) -> str:
    """Everything, with times in microseconds."""
    content: dict[str, Any] = {
        "machine": report.machine,
        "baseline": report.baseline,
        "settings": {**asdict(report.settings), "wire": report.settings.wire.model_dump(mode="json")},
        "copy_gbytes_per_s": report.copy_gbytes_per_s,
        "machine_times_us": None if report.times is None else report.times._asdict(),
        "floor_us": {str(size): report.settings.wire.floor_us(size) for size in report.settings.sizes},
        "rows": [{**asdict(row), "gbytes_per_s": row.gbytes_per_s} for row in report.rows],
    }
    return indented_json(content)


PLOT_FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raises ConfigurationError if `plot` would fail, before anything has been measured."""
    if path.suffix not in PLOT_FORMATS:
        raise ConfigurationError(f"--plot {path} must end in {', '.join(PLOT_FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError("--plot needs matplotlib; install it: pip install matplotlib")


def plot(report: Report, path: Path) -> None:
    """Draws medians over sizes, both logarithmic, into `path`; the suffix chooses the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for candidate, mode in dict.fromkeys((row.candidate, row.mode) for row in report.rows):
        rows = [row for row in report.rows if (row.candidate, row.mode) == (candidate, mode)]
        sizes, medians = [row.bytes for row in rows], [row.median for row in rows]
        axes.plot(sizes, medians, marker="o", label=f"{candidate}, {mode}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("bytes of each rank's input")
    axes.set_ylabel("microseconds, median")
    axes.set_title(f"{report.settings.collective}: {report.machine}", fontsize="small")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path)
