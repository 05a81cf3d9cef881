"""`vllm-spark bench decode`: times a decode step of vLLM on this machine, with one rank and with two."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_spark import __version__
from vllm_spark.cli.arguments import (
    add_wire_arguments,
    engine_arguments,
    modelled_wire,
    positive,
    positives,
    user_path,
    wide_console,
)
from vllm_spark.errors import ConfigurationError
from vllm_spark.files import check_writable

if TYPE_CHECKING:
    from vllm_spark.bench.decode.measurement import Settings

SUMMARY = "a decode step of vLLM with random weights: one rank, this project's pair, vLLM's own pair"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options: what to measure, and the files to write."""
    parser.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: cuda where there is a GPU"
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="a folder with a config.json, or a name in configs/models (default on GPUs: qwen3-30b-a3b-int4), or "
        "tiny-moe (default on CPUs)",
    )
    parser.add_argument(
        "--candidates",
        metavar="NAME,...",
        help="tp1 (one rank), spark (the pair, direct), spark-wire (through the proxy and the modelled wire), stock "
        "(vLLM's own pair); on GPUs also nccl (NCCL as it chooses), nccl-host (over host memory), untuned and tuned "
        "(one rank without and with tuned tables). Default: all but the last two; with --one-gpu those that run there",
    )
    parser.add_argument(
        "--batches", type=positives, default=(1, 4, 8), metavar="N,...", help="sequences at once (default: 1,4,8)"
    )
    parser.add_argument(
        "--steps", type=positive, metavar="N", default=200, help="timed steps for each batch (default: 200)"
    )
    parser.add_argument(
        "--rounds", type=positive, metavar="N", default=1, help="how often all candidates run (default: 1)"
    )
    parser.add_argument(
        "--prompt-tokens", type=positive, metavar="N", default=64, help="length of each prompt (default: 64)"
    )
    parser.add_argument("--compile", action="store_true", help="with torch.compile; default: CUDA graphs alone")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also time the kernels of rank 0's GPU at the first batch; those of a collective include waits for rank 1",
    )
    parser.add_argument(
        "--one-gpu", action="store_true", help="both ranks on one GPU: a test of function, not of speed"
    )
    parser.add_argument(
        "--engine", type=engine_arguments, default={}, metavar="JSON", help="more arguments of vllm.LLM"
    )
    parser.add_argument(
        "--timeout", type=positive, default=900, metavar="SECONDS", help="for each candidate (default: 900)"
    )
    add_wire_arguments(parser)
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write all figures there as well")
    parser.add_argument(
        "--keep-logs", type=user_path, metavar="DIR", help="write the engines' output there and keep it"
    )


def run(args: argparse.Namespace) -> int:
    """Runs all candidates, and prints one table, also of some of them after a failure or Ctrl-C.

    Raises:
        SparkError: bad arguments, or a candidate failed; its logs are shown and kept.
    """
    try:
        import torch
        import vllm  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(f"the benchmark needs vLLM and torch here ({error}); install vLLM") from None
    from vllm_spark.bench.decode import measurement as decode
    from vllm_spark.bench.decode.report import as_json, as_table, profile_tables
    from vllm_spark.bench.statistics import machine
    from vllm_spark.processes.group import process_group

    settings = _settings(args)
    if args.json is not None:
        check_writable(args.json)
    decode.check(settings)
    console = wide_console()
    progress = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), transient=True)
    gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if settings.device == "cuda" else "CPU"
    measured: list[decode.Report] = []

    def where() -> str:
        return machine(gpus, f"vllm {measured[-1].vllm}", f"torch {torch.__version__}", f"vllm_spark {__version__}")

    def keep(report: decode.Report) -> None:
        measured.append(report)
        if args.json is not None:
            args.json.write_text(as_json(report, where()) + "\n")

    try:
        console.print(_announcement(settings), soft_wrap=True)
        with process_group("bench", console, args.keep_logs) as programs, progress:
            task = progress.add_task("")

            def show(name: str, number: int) -> None:
                step = f"round {number + 1}: {name}"
                progress.update(task, description=step)
                if not console.is_terminal:  # a terminal shows the progress line
                    console.print(step)

            decode.measure(settings, programs, show, keep)
    finally:
        if measured:
            console.print(as_table(measured[-1], where()), *profile_tables(measured[-1]))
    return 0


def _announcement(settings: Settings) -> str:
    """What is measured, and about how long that takes."""
    runs = len(settings.candidates) * settings.rounds
    return (
        f"Starting {runs} engine{'' if runs == 1 else 's'} of vLLM one after the other, with the model "
        f"{settings.model}: {', '.join(settings.candidates)}. Each takes from half a minute (tiny-moe) to several "
        "minutes (a large model, --compile); the table is printed after the last one."
    )


def _settings(args: argparse.Namespace) -> Settings:
    """The settings of the options and defaults.

    Raises:
        ConfigurationError: those of the wire contradict each other, or name no wire model.
    """
    import torch

    from vllm_spark.bench.decode import measurement as decode

    wire = modelled_wire(args)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    names = decode.default_candidates(device, args.one_gpu) if args.candidates is None else args.candidates.split(",")
    return decode.Settings(
        device=device,
        model=args.model or decode.SHIPPED_MODELS[device],
        candidates=tuple(names),
        batches=args.batches,
        steps=args.steps,
        rounds=args.rounds,
        prompt_tokens=args.prompt_tokens,
        compile=args.compile,
        one_gpu=args.one_gpu,
        wire=wire,
        engine=args.engine,
        timeout=args.timeout,
        profile=args.profile,
    )
