"""`vllm-spark bench`: what collectives cost on this machine."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from vllm_spark import __version__
from vllm_spark.errors import ConfigurationError

SUMMARY = "measure collectives against what vLLM uses without this project"

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mib": 1 << 20}
_LARGEST = 64 << 20
_LARGEST_AMOUNT = 1e6
_FILE_WIDTH = 120  # columns, where the output is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, and where to put it."""
    parser.add_argument("what", choices=["collective"], help="collective: one all-reduce or all-gather")
    parser.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: cuda where there are two GPUs"
    )
    parser.add_argument("--collective", choices=["all_reduce", "all_gather"], default="all_reduce")
    parser.add_argument(
        "--sizes", type=_sizes, default=None, metavar="SIZE,...", help="1KiB to 64MiB; default: 1KiB, 4KiB, ... 64MiB"
    )
    parser.add_argument("--samples", type=_positive, default=60, help="timings for each figure (default: 60)")
    parser.add_argument("--latency-us", type=_amount, default=3.2, help="of the modelled wire (default: 3.2)")
    parser.add_argument(
        "--gbytes-per-s", type=_amount, default=24.0, help="of the modelled wire (default: 24; 0: unlimited)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw medians over sizes (png, svg or pdf)")


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table for each mode, and writes the files that were asked for."""
    try:
        import torch
    except ImportError:
        raise ConfigurationError("the benchmark needs torch, which comes with vLLM; install vLLM here") from None
    from vllm_spark.bench.collective import DEFAULT_SIZES, Settings, check_gpus, measure, rows_to_come
    from vllm_spark.bench.report import as_json, as_table, check_plot, plot
    from vllm_spark.bench.samples import machine

    for path in filter(None, (args.json, args.plot)):
        if not os.access(path.resolve().parent, os.W_OK):
            raise ConfigurationError(f"{path} cannot be written: {path.resolve().parent} is no folder that takes files")
        if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
            raise ConfigurationError(f"{path} cannot be written: it is a folder, or protected; give another file")
    if args.plot is not None:
        check_plot(args.plot)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() > 1 else "cpu"
    if device == "cuda":
        check_gpus()
    settings = Settings(
        device, args.sizes or DEFAULT_SIZES, args.samples, args.latency_us, args.gbytes_per_s, args.collective
    )
    name = f"2 x {torch.cuda.get_device_name()}" if device == "cuda" else "CPU"
    where = machine(name, f"torch {torch.__version__}", f"vllm_spark {__version__}")
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), transient=True) as progress:
        task = progress.add_task("measuring", total=rows_to_come(settings))
        report = measure(settings, where, lambda row: progress.advance(task))
    for mode in dict.fromkeys(row.mode for row in report.rows):
        console.print(as_table(report, mode))
    if args.json is not None:
        args.json.write_text(as_json(report) + "\n")
    if args.plot is not None:
        plot(report, args.plot)
    return 0


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_size(word) for word in text.split(","))


def _size(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 4096, 4KiB or 1MiB")
    size = int(match.group(1)) * unit
    if not 2 <= size <= _LARGEST or size % 2:
        raise argparse.ArgumentTypeError(f"{text} is out of range; sizes are even, from 2 bytes to 64MiB")
    return size


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of samples; give 1 or more")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= _LARGEST_AMOUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to {_LARGEST_AMOUNT:g}")
    return value
