"""`vllm-spark tune MODEL`: searches for parameters on this machine's GPU, and keeps what makes decode steps faster."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vllm_spark.cli.bench.arguments import engine_arguments, positive
from vllm_spark.cli.bench.output import check_writable, wide_console
from vllm_spark.data_folders import data_folder
from vllm_spark.errors import ConfigurationError

if TYPE_CHECKING:
    from vllm_spark.bench.tuned_decode import Comparison
    from vllm_spark.tuning.outcome import Outcome, Shape
    from vllm_spark.tuning.tuned_model import TunedModel
    from vllm_spark.tuning.tuner import NewTable

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""As the hub names models: of an owner, and not a path."""

LARGEST_ROWS = 8
"""Tokens of the largest step that gets an entry: above, batches are large enough for vLLM's rule to be right."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to tune for, and where the tables go."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder or file with a config.json, a model of the hub, or one of this project's (configs/models)",
    )
    parser.add_argument(
        "--tp", type=_numbers, default=(2,), metavar="N,...", help="tensor parallel sizes to tune for (default: 2)"
    )
    parser.add_argument(
        "--kernels",
        choices=["auto", "marlin", "triton"],
        default="auto",
        help="for experts: Marlin for int4 weights and Triton for all others, or one of them (default: auto)",
    )
    parser.add_argument(
        "--rows",
        type=_rows,
        default=tuple(range(1, LARGEST_ROWS + 1)),
        metavar="N,...",
        help="tokens of a decode step, up to 8; larger steps stay as vLLM runs them (default: 1 to 8)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: where `vllm serve --spark` looks for tables"
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=4,
        help="engines that each side decodes with, the two taking turns at being first (default: 4)",
    )
    parser.add_argument(
        "--no-decode", dest="decode", action="store_false", help="trust the kernels' times; no engine is started"
    )
    parser.add_argument(
        "--engine", type=engine_arguments, default={}, metavar="JSON", help="more arguments of vllm.LLM"
    )
    parser.add_argument(
        "--timeout", type=positive, default=900, metavar="SECONDS", help="for each engine (default: 900)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times into a .png, .svg or .pdf")
    parser.add_argument(
        "--keep-logs",
        type=Path,
        metavar="DIR",
        help="write the engines' output there, into a folder for each size, and keep it",
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positive(word) for word in text.split(",")))


def _rows(text: str) -> tuple[int, ...]:
    rows = _numbers(text)
    if max(rows) > LARGEST_ROWS:
        raise argparse.ArgumentTypeError(f"{max(rows)} is more than {LARGEST_ROWS} tokens; tables end there")
    return tuple(sorted(rows))


def run(args: argparse.Namespace) -> int:
    """Searches, compares whole decode steps, and writes the tables.

    Raises:
        SparkError: no GPU, no vLLM, no place for the tables, a model that is not known, or a kernel that failed.
    """
    name, config = _read_model(args.model)
    from vllm_spark.tuning.lookup import user_folder
    from vllm_spark.tuning.tuned_model import TunedModel, layers_as_served, shapes_of

    models = [TunedModel(name, tp, layers_as_served(config, tp)) for tp in args.tp]
    shapes = [(model, shapes_of(model, args.kernels)) for model in models]
    labels: dict[Shape, list[str]] = {}
    for model, its in shapes:
        for shape in its:
            labels.setdefault(shape, []).append(model.label)
    if not labels:
        raise ConfigurationError(f"there is nothing to tune in {name}: {_NOTHING[args.kernels]}")
    if args.kernels == "triton":
        _check_triton_takes(name, config)
    out = args.out or user_folder()
    if out is None:
        raise ConfigurationError("this user has no home folder for the tables; give a folder with --out")
    _check_folder(out)
    if args.plot is not None:
        from vllm_spark.bench.collective_report import check_plot

        check_plot(args.plot)
        check_writable(args.plot)
    torch = _torch_with_gpu()
    if args.kernels == "triton":
        _check_version_takes_int4(list(labels))
    from vllm_spark.tuning.journal import Journal, Kept
    from vllm_spark.tuning.promotion import promoted
    from vllm_spark.tuning.report import outcomes_tables, plot
    from vllm_spark.tuning.serving import this_device
    from vllm_spark.tuning.tuner import store, tables, tune
    from vllm_spark.tuning.versions import installed_versions

    device = this_device()
    versions = installed_versions()
    where = ", ".join([torch.cuda.get_device_name(), *(f"{each} {version}" for each, version in versions.items())])
    journal = Journal(out, device.name, versions)
    console = wide_console()
    outcomes: list[Outcome] = []
    notes: dict[str, None] = {}
    with (
        _ended_in_order(),
        Progress(
            *Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn(), transient=True
        ) as progress,
    ):
        task = progress.add_task("searching", total=len(labels) * len(args.rows))
        compiled = 0

        def show(outcome: Outcome) -> None:
            outcomes.append(outcome)
            progress.advance(task)

        def show_kernel() -> None:
            nonlocal compiled
            compiled += 1
            progress.update(task, description=f"searching, {compiled} kernels compiled")

        try:
            tune(list(labels), args.rows, device, journal, show, show_kernel, notes.setdefault)
        except (KeyboardInterrupt, SystemExit):
            progress.stop()
            console.print(
                f"Stopped: {len(outcomes)} of {len(labels) * len(args.rows)} results are kept in {out}; "
                "the same command goes on there.",
                soft_wrap=True,
            )
            raise
    for table in outcomes_tables(outcomes, where):
        console.print(table)
    for sentence in notes:
        console.print(f"[yellow]NOTE[/]: {escape(sentence)}", soft_wrap=True)
    if args.plot is not None:
        plot(outcomes, where, args.plot)
    kept = journal.kept().values()
    if args.decode:
        for model, its in shapes:
            mine = [outcome for outcome in outcomes if outcome.shape in its]
            if not mine:
                continue
            engine = {**_backend(its), **args.engine}
            candidates = tables(mine, labels, device, versions, kept, out)
            comparisons = _compare(config, model, engine, candidates, args, console)
            console.print(_comparison_table(model.label, comparisons, where))
            ratios = {each.batch: each.ratio for each in comparisons}
            outcomes = [each for each in outcomes if each.shape not in its] + promoted(mine, ratios)
    else:
        console.print("No decode step was compared (--no-decode): the tables rest on the kernels' times alone.")
    journal.keep([Kept(outcome, tuple(labels[outcome.shape])) for outcome in outcomes])
    for path in store(tables(outcomes, labels, device, versions, kept, out), out):
        console.print(f"Written: {path}", soft_wrap=True)
    for sentence in _who_reads(list(labels)):
        console.print(sentence, soft_wrap=True)
    return 0


_NOTHING = {
    "auto": "it has no experts in int4 (Marlin), bfloat16 or fp8 (Triton), and vLLM's other kernels for decode steps "
    "take no parameters",
    "marlin": "none of its experts have int4 weights, and Marlin's other kernels take no parameters",
    "triton": "it has no experts in int4, bfloat16 or fp8, which are those that Triton's kernel takes",
}


def _check_triton_takes(name: str, config: dict[str, Any]) -> None:
    """Refuses layouts of int4 weights that vLLM runs on Marlin alone."""
    text = config.get("text_config")
    described = config.get("quantization_config") or (text if isinstance(text, dict) else {}).get("quantization_config")
    described = described if isinstance(described, dict) else {}
    if str(described.get("quant_method", "")).lower() == "awq":
        reason = "AWQ's layout of int4 weights"
    elif described.get("desc_act"):
        reason = "GPTQ's int4 weights in an order of their own (desc_act)"
    else:
        return
    raise ConfigurationError(
        f"vLLM's Triton kernel does not take {reason}, which {name} has; leave --kernels triton out to tune Marlin"
    )


def _check_version_takes_int4(shapes: list[Shape]) -> None:
    from vllm_spark.compat import triton_runs_int4_experts, vllm_version
    from vllm_spark.tuning.fused_moe_shape import FusedMoeExperts

    if any(isinstance(shape, FusedMoeExperts) and shape.is_int4 for shape in shapes) and not triton_runs_int4_experts():
        raise ConfigurationError(
            f"vLLM {vllm_version()} runs int4 experts on Marlin alone; leave --kernels triton out, or use a later vLLM"
        )


def _check_folder(folder: Path) -> None:
    """Raises ConfigurationError if `folder` cannot be made or written, and makes nothing yet."""
    parent = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what = "is protected" if parent.is_dir() else "is a file"
        raise ConfigurationError(f"the folder {folder} cannot be written: {parent} {what}; give another with --out")


def _backend(shapes: list[Shape]) -> dict[str, str]:
    """Arguments of an engine that reads the tables of these shapes; a model has one backend for all of its experts."""
    from vllm_spark.tuning.fused_moe_shape import FusedMoeExperts

    return {"moe_backend": "triton"} if all(isinstance(shape, FusedMoeExperts) for shape in shapes) else {}


def _who_reads(shapes: list[Shape]) -> list[str]:
    """Sentences about tables that vLLM does not read by itself."""
    from vllm_spark.tuning.fused_moe_shape import FusedMoeExperts
    from vllm_spark.tuning.tuned_model import not_read_by_default

    return [
        f"Serve with --moe-backend triton, or the table for {shape.describe()} is not read: {reason}."
        for shape in shapes
        if isinstance(shape, FusedMoeExperts) and (reason := not_read_by_default(shape)) is not None
    ]


def _compare(
    config: dict[str, Any],
    model: TunedModel,
    engine: dict[str, Any],
    candidates: list[NewTable],
    args: argparse.Namespace,
    console: Console,
) -> list[Comparison]:
    """Decode steps with and without the candidates, in engines that see these tables and no other of this user's."""
    from vllm_spark.bench.tuned_decode import Settings, compare
    from vllm_spark.stage import set_stage
    from vllm_spark.tuning.tuner import store

    progress = Progress(
        *Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn(), transient=True
    )
    logs = None if args.keep_logs is None else args.keep_logs / f"tp{model.tp}"
    with set_stage("tune", console, logs) as stage, progress:
        folder = stage.folder / "config" / "vllm-spark" / "tuned"
        store(candidates, folder)
        task = progress.add_task("decoding", total=2 * args.rounds)
        settings = Settings(config, model.tp, folder, rounds=args.rounds, engine=engine, timeout=args.timeout)
        started = 0

        def show(side: str, number: int) -> None:
            nonlocal started
            progress.update(task, completed=started, description=f"decoding TP={model.tp}, round {number + 1}: {side}")
            started += 1

        return compare(settings, stage, show)


def _comparison_table(label: str, comparisons: list[Comparison], where: str) -> Table:
    from vllm_spark.tuning.promotion import is_kept

    table = Table(title=f"A decode step of one rank of {label}, milliseconds, medians of the rounds", caption=where)
    for heading in ("batch", "vLLM's defaults", "tuned", "ratio", ""):
        table.add_column(heading, justify="right")
    for each in comparisons:
        verdict = "kept" if is_kept(each.ratio) else "not kept"
        times = (" ".join(f"{time:.3f}" for time in side) for side in (each.untuned, each.tuned))
        table.add_row(str(each.batch), *times, f"{each.ratio:.3f}", verdict)
    return table


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP end what is inside as Ctrl-C does: compilers that run are ended."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _read_model(model: str) -> tuple[str, dict[str, Any]]:
    """Its name, and the content of its config.json: from a folder, a file, this project's, or the hub.

    Raises:
        ConfigurationError: there is none, or it is no JSON object.
    """
    given, shipped = Path(model), data_folder("configs") / "models"
    for path in (given, given / "config.json", shipped / model / "config.json"):
        if path.is_file():
            break
    else:
        path = _from_hub(model, shipped)
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigurationError(f"{path} is no JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"{path} holds no JSON object, as a config.json does")
    return (path.parent.name if path.name == "config.json" and path.parent.parent == shipped else model), config


def _from_hub(model: str, shipped: Path) -> Path:
    """The config.json of a model that vLLM would load by this name."""
    names = ", ".join(sorted(path.name for path in shipped.iterdir() if path.is_dir()))
    remedy = f"give a folder or file with a config.json, a model of the hub, or one of {names}"
    if not _HUB_NAME.fullmatch(model):
        raise ConfigurationError(f"there is no model {model!r} here; {remedy}")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ConfigurationError(f"there is no model {model!r} here; {remedy}") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it retries for half a minute, and logs each time
    try:
        return Path(hf_hub_download(model, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            f"there is no model {model!r} here, and the hub gave none ({reason}); {remedy}"
        ) from None


def _torch_with_gpu() -> Any:
    """torch, with vLLM's kernels loaded.

    Raises:
        ConfigurationError: one of them, or the GPU, is not there.
    """
    try:
        import torch
        import vllm  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(f"tuning needs vLLM and torch here ({error}); install vLLM") from None
    if not torch.cuda.is_available():
        raise ConfigurationError("tuning needs a GPU that CUDA sees, and this machine has none; run it where you serve")
    return torch
