"""A benchmark's report as a table, as JSON and as a plot."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from vllm_spark.bench.collective import Report
from vllm_spark.errors import ConfigurationError

_UNITS = ((1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))


def format_size(size: int) -> str:
    """`4 KiB` for 4096."""
    unit, name = next((unit, name) for unit, name in _UNITS if (size % unit == 0 and size >= unit) or unit == 1)
    return f"{size // unit} {name}"


def as_table(report: Report, mode: str) -> Table:
    """Medians and 99th percentiles of one mode, and the ratio to the last candidate, the peer over host memory."""
    candidates = list(dict.fromkeys(row.candidate for row in report.rows))
    peer = candidates[-1]
    settings = report.settings
    table = Table(
        title=f"{settings.collective} of bfloat16, {mode}, microseconds for one call",
        caption=f"{report.machine}. Median / 99th percentile. wire: proxied, {settings.latency_us:g} us and "
        f"{settings.gbytes_per_s:g} GB/s modelled. The limit: one large copy, {report.copy_gbytes_per_s:.1f} GB/s.",
    )
    table.add_column("size", justify="right", no_wrap=True)
    for name in candidates:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"direct / {peer}", justify="right")
    table.add_column("of the limit", justify="right")
    for size in settings.sizes:
        rows = {row.candidate: row for row in report.rows if (row.mode, row.bytes) == (mode, size)}
        cells = [f"{_time(rows[name].median)} / {_time(rows[name].p99)}" if name in rows else "" for name in candidates]
        ratio, share = "", ""
        if "direct" in rows and peer in rows:
            ratio = f"{rows['direct'].median / rows[peer].median:.2f}"
            share = f"{rows['direct'].gbytes_per_s / report.copy_gbytes_per_s:.0%}"
        table.add_row(format_size(size), *cells, ratio, share)
    return table


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:.0f}"


def as_json(report: Report) -> str:
    """Everything, with times in microseconds."""
    content: dict[str, Any] = {
        "machine": report.machine,
        "settings": asdict(report.settings),
        "copy_gbytes_per_s": report.copy_gbytes_per_s,
        "rows": [{**msgspec.to_builtins(row), "gbytes_per_s": row.gbytes_per_s} for row in report.rows],
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=1).decode()


PLOT_FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raises ConfigurationError if `plot` would fail, before anything has been measured."""
    if path.suffix not in PLOT_FORMATS:
        raise ConfigurationError(f"--plot {path} must end in {', '.join(PLOT_FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError("--plot needs matplotlib; install it: pip install 'vllm-spark[bench]'")


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
