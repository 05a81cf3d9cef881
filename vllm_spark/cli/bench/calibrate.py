"""`vllm-spark bench calibrate`: finds the fastest launch shapes of collectives on this GPU."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from vllm_spark.cli.arguments import (
    add_wire_arguments,
    modelled_wire,
    positive,
    user_path,
    wide_console,
)
from vllm_spark.errors import ConfigurationError, SparkError
from vllm_spark.files import check_writable

if TYPE_CHECKING:
    from vllm_spark.collective import RuntimeOptions
    from vllm_spark.collective.launch_table import LaunchTable

SUMMARY = "find the launch shapes of collectives that are fastest on this GPU, and write them for serving"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options: the path to measure, and the table's file."""
    parser.add_argument(
        "--path",
        choices=["direct", "wire"],
        default="wire",
        help="wire: through the proxy and the modelled wire, as between two machines; direct: without (default: wire)",
    )
    parser.add_argument(
        "--samples", type=positive, metavar="N", default=30, help="timings of each size in a round (default: 30)"
    )
    parser.add_argument(
        "--rounds", type=positive, metavar="N", default=5, help="pairs of ranks for each value (default: 5)"
    )
    add_wire_arguments(parser)
    parser.add_argument(
        *("--output", "--out"),
        dest="output",
        type=user_path,
        metavar="FILE",
        help="file of the table; default: the file that `vllm serve --spark` reads",
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints every trial, and writes the table.

    Raises:
        SparkError: no GPU, no kernels, no place for the table, or a rank failed.
    """
    # Before CUDA starts: see GpuPair.
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    try:
        import torch
    except ImportError:
        raise ConfigurationError("the benchmark needs torch, which comes with vLLM; install vLLM here") from None
    if not torch.cuda.is_available():
        raise ConfigurationError("calibration needs a GPU; on a CPU collectives have no launch shapes")
    from vllm_spark.bench.calibrate import shares_one_gpu
    from vllm_spark.collective.launch_table import default_path, store_launch_table

    out = args.output or default_path()
    if out is None:
        raise ConfigurationError("this user has no home folder for the table; give a file with --output")
    if args.output is not None:
        check_writable(args.output)
    console = wide_console()
    best = _calibrated(args, torch.cuda.get_device_name(), _options(args), console)
    store_launch_table(best, out)
    if shares_one_gpu() and best.shape is not None:
        console.print(
            f"Both ranks shared this machine's only GPU: payload_blocks stays {best.shape.payload_blocks}, since its "
            "best value for a GPU per rank cannot be measured here.",
            soft_wrap=True,
        )
    console.print(f"Best: {best.shape}, packets up to {best.packet_kib} KiB. Written to {out}", soft_wrap=True)
    return 0


def _options(args: argparse.Namespace) -> RuntimeOptions:
    """The options of both ranks for the requested path.

    Raises:
        ConfigurationError: options of a wire for a path without one, or no wire model.
    """
    from vllm_spark.collective import RuntimeOptions

    wire = modelled_wire(args)
    if args.path == "wire":
        return RuntimeOptions(
            timeout_s=10.0,
            loopback_mode="proxied",
            wire=wire,
        )
    if (args.wire, args.latency_us, args.gbytes_per_s) != (None, None, None):
        raise ConfigurationError(
            "--wire, --latency-us and --gbytes-per-s describe the modelled wire, which --path direct does not use; "
            "leave them out"
        )
    return RuntimeOptions(timeout_s=10.0)


def _calibrated(args: argparse.Namespace, gpu: str, options: RuntimeOptions, console: Console) -> LaunchTable:
    """Measures, and prints every trial, even if a later one fails.

    Raises:
        SparkError: a rank failed.
    """
    from vllm_spark.bench.calibrate import Trial, calibrate, rows_to_come
    from vllm_spark.bench.collective_report import format_size
    from vllm_spark.collective import CollectiveError

    table = Table(title=f"{gpu}, {args.path}: microseconds, medians", show_lines=False)
    for column in ("parameter", "value", "mean", "by size"):
        table.add_column(column, justify="right" if column == "mean" else "left")

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), transient=True) as progress:
        task = progress.add_task("calibrating", total=rows_to_come())

        def show(trial: Trial) -> None:
            progress.advance(task)
            sizes = "  ".join(f"{format_size(size)} {time:.1f}" for size, time in trial.medians.items())
            table.add_row(trial.parameter, str(trial.value), f"{trial.mean:.2f}", sizes)

        try:
            return calibrate(gpu, options, args.rounds, args.samples, show)
        except CollectiveError as error:
            raise SparkError(str(error)) from None
        finally:
            console.print(table)
