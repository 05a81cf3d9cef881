"""`vllm-spark bench collective`: times one all-reduce or all-gather on this machine."""

from __future__ import annotations

import argparse

from rich.progress import Progress, TimeElapsedColumn

from vllm_spark import __version__
from vllm_spark.cli.arguments import (
    add_wire_arguments,
    modelled_wire,
    positive,
    sizes,
    user_path,
    wide_console,
)
from vllm_spark.errors import ConfigurationError
from vllm_spark.files import check_writable

SUMMARY = "one all-reduce or all-gather, against NCCL or gloo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options: what to measure, and the files to write."""
    parser.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: cuda where there are two GPUs"
    )
    parser.add_argument(
        "--collective",
        choices=["all_reduce", "all_gather", "logits_gather"],
        default="all_reduce",
        help="logits_gather: [1, 75968] and [8, 75968] along the last dimension, as every step of decoding does",
    )
    parser.add_argument(
        "--sizes",
        type=sizes,
        default=None,
        metavar="SIZE,...",
        help="2 bytes to 64MiB, even; default: sizes of decoding and prefill from 1KiB to 32MiB",
    )
    parser.add_argument(
        "--samples", type=positive, metavar="N", default=60, help="timings for each figure (default: 60)"
    )
    add_wire_arguments(parser)
    parser.add_argument(
        "--peers", action="store_true", help="show what other projects published for pairs of GB10 in a column"
    )
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--plot", type=user_path, metavar="FILE", help="draw medians over sizes (png, svg or pdf)")


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table for each mode, and writes the requested files."""
    try:
        import torch
    except ImportError:
        raise ConfigurationError("the benchmark needs torch, which comes with vLLM; install vLLM here") from None
    from vllm_spark.bench.collective import DEFAULT_SIZES, LOGITS_SIZES, Settings, check_gpus, measure, rows_to_come
    from vllm_spark.bench.collective_report import as_json, as_table, check_plot, plot
    from vllm_spark.bench.statistics import machine

    wire = modelled_wire(args)
    for path in filter(None, (args.json, args.plot)):
        check_writable(path)
    if args.plot is not None:
        check_plot(args.plot)
    defaults = DEFAULT_SIZES
    if args.collective == "logits_gather":
        if args.sizes is not None:
            raise ConfigurationError(
                "--sizes cannot be combined with --collective logits_gather, which has fixed sizes; leave it out"
            )
        defaults = LOGITS_SIZES
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() > 1 else "cpu"
    if device == "cuda":
        check_gpus()
    settings = Settings(device, args.sizes or defaults, args.samples, wire, args.collective)
    name = f"2 x {torch.cuda.get_device_name()}" if device == "cuda" else "CPU"
    where = machine(name, f"torch {torch.__version__}", f"vllm_spark {__version__}")
    console = wide_console()
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), transient=True) as progress:
        task = progress.add_task("measuring", total=rows_to_come(settings))
        report = measure(settings, where, lambda row: progress.advance(task))
    for mode in dict.fromkeys(row.mode for row in report.rows):
        console.print(as_table(report, mode, args.peers))
    if args.json is not None:
        args.json.write_text(as_json(report) + "\n")
    if args.plot is not None:
        plot(report, args.plot)
    return 0
