"""`vllm-spark tune MODEL`: searches for parameters on this machine's GPU, and keeps what makes decode steps faster."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vllm_spark.cli import PROGRAM
from vllm_spark.cli.arguments import check_writable, engine_arguments, positive, positives, user_path, wide_console
from vllm_spark.errors import ConfigurationError

if TYPE_CHECKING:
    from vllm_spark.kernels.devices import Device
    from vllm_spark.tune.decode_comparison import Comparison
    from vllm_spark.tune.journal import Journal
    from vllm_spark.tune.keeping import Judge
    from vllm_spark.tune.plan import Plan
    from vllm_spark.tune.results import Outcome, Shape
    from vllm_spark.tune.timing import HangError
    from vllm_spark.tune.tuned_model import TunedModel
    from vllm_spark.tune.tuner import NewTable

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
        "--tp", type=_sizes, default=(2,), metavar="N,...", help="tensor parallel sizes to tune for (default: 2)"
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
        "--out", type=user_path, metavar="FOLDER", help="default: where `vllm serve --spark` looks for tables"
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
    parser.add_argument("--plot", type=user_path, metavar="FILE", help="draw the times into a .png, .svg or .pdf")
    parser.add_argument(
        "--keep-logs",
        type=user_path,
        metavar="DIR",
        help="write the engines' output there, into a folder for each size, and keep it",
    )


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positives(text)))


def _rows(text: str) -> tuple[int, ...]:
    rows = sorted(set(positives(text)))
    if max(rows) > LARGEST_ROWS:
        raise argparse.ArgumentTypeError(f"{max(rows)} is more than {LARGEST_ROWS} tokens; tables end there")
    return tuple(rows)


def run(args: argparse.Namespace) -> int:
    """Searches, compares whole decode steps, and writes the tables.

    Raises:
        SparkError: no GPU, no vLLM, no place for the tables, a model that is not known, or a kernel that failed.
    """
    from vllm_spark.tune.plan import make_plan

    plan = make_plan(args.model, args.tp, args.kernels, args.rows)
    out = _checked_folder(args, plan)
    torch = _torch_with_gpu()
    from vllm_spark.kernels.runtime import this_device
    from vllm_spark.tune.journal import Journal, installed_versions
    from vllm_spark.tune.plan import backend, check_version_takes_int4, who_reads
    from vllm_spark.tune.report import outcomes_tables, plot
    from vllm_spark.tune.timing import claim
    from vllm_spark.tune.tuner import tables

    if args.kernels == "triton":
        check_version_takes_int4(plan.labels)
    device, versions = this_device(), installed_versions()
    where = ", ".join([torch.cuda.get_device_name(), *(f"{each} {version}" for each, version in versions.items())])
    journal = Journal(out, device.name, versions)
    console = wide_console()
    with _ended_in_order(), journal.alone(), claim(str(torch.cuda.get_device_properties(0).uuid)):
        outcomes = _search(list(plan.labels), args.rows, device, journal, out, console)
        for table in outcomes_tables(outcomes, where):
            console.print(table)

        def tables_of(mine: list[Outcome]) -> list[NewTable]:
            return tables(mine, plan.labels, device, versions, journal.kept().values(), out)

        def judge(model: TunedModel, its: list[Shape], candidates: list[NewTable]) -> dict[int, float]:
            comparisons = _compare(plan.config, model, {**backend(its), **args.engine}, candidates, args, console)
            console.print(_comparison_table(model.label, comparisons, where))
            return {each.batch: each.ratio for each in comparisons}

        if not args.decode:
            console.print("No decode step was compared (--no-decode): the tables rest on the kernels' times alone.")
        _keep(outcomes, plan.sizes, plan.labels, tables_of, judge if args.decode else None, journal, out, console)
    for sentence in who_reads(plan.labels):
        console.print(sentence, soft_wrap=True)
    if args.plot is not None:
        plot(outcomes, where, args.plot)
    return 0


def _checked_folder(args: argparse.Namespace, plan: Plan) -> Path:
    """The tables' folder.

    Raises:
        ConfigurationError: it, or another file or shard that comes later, cannot be written or made.
    """
    from vllm_spark.kernels.lookup import user_folder
    from vllm_spark.models.regroup import with_groups_that_fit
    from vllm_spark.models.shard import shard_as_model

    out = args.out or user_folder()
    if out is None:
        raise ConfigurationError("this user has no home folder for the tables; give a folder with --out")
    _check_folder(out, "--out")
    if args.plot is not None:
        from vllm_spark.bench.collective_report import check_plot

        check_plot(args.plot)
        check_writable(args.plot)
    if args.decode:
        if args.keep_logs is not None:
            _check_folder(args.keep_logs, "--keep-logs")
        for model, _ in plan.sizes:  # a shard that cannot be made is no reason to lose a search
            shard_as_model(with_groups_that_fit(plan.config, model.tp), model.tp)
    return out


def _search(
    shapes: list[Shape], rows: tuple[int, ...], device: Device, journal: Journal, out: Path, console: Console
) -> list[Outcome]:
    from vllm_spark.tune.results import tunable_rows
    from vllm_spark.tune.timing import HangError
    from vllm_spark.tune.tuner import tune

    outcomes: list[Outcome] = []
    notes: dict[str, None] = {}
    total = sum(len(tunable_rows(shape, rows)) for shape in shapes)
    progress = Progress(
        *Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn(), transient=True
    )

    def kept() -> str:
        return f"{len(outcomes)} of {total} results are kept in {out}; the same command goes on there"

    with _told_when_stopped(console, kept), progress:
        task = progress.add_task("searching", total=total)
        compiled = 0

        def show(outcome: Outcome) -> None:
            outcomes.append(outcome)
            progress.advance(task)

        def show_kernel() -> None:
            nonlocal compiled
            compiled += 1
            progress.update(task, description=f"searching, {compiled} kernels compiled")

        try:
            tune(shapes, rows, device, journal, show, show_kernel, notes.setdefault)
        except HangError as error:
            progress.stop()
            _end_at_once(error, out)
    for sentence in notes:
        _note(console, sentence)
    return outcomes


def _keep(
    outcomes: list[Outcome],
    sizes: list[tuple[TunedModel, list[Shape]]],
    labels: dict[Shape, list[str]],
    tables_of: Callable[[list[Outcome]], list[NewTable]],
    judge: Judge | None,
    journal: Journal,
    out: Path,
    console: Console,
) -> None:
    """As `keeping.keep`, and says what is written."""
    from vllm_spark.tune.keeping import keep

    done = 0

    def kept() -> str:
        return (
            f"tables for {done} of {len(sizes)} sizes are written, and what the search found is kept in {out}; the "
            "same command compares decode steps again"
        )

    def show(written: list[Path]) -> None:
        nonlocal done
        for each in written:
            console.print(f"Written: {each}", soft_wrap=True)
        done += 1

    with _told_when_stopped(console, kept):
        keep(outcomes, sizes, labels, tables_of, judge, journal, out, show, lambda sentence: _note(console, sentence))


def _note(console: Console, sentence: str) -> None:
    console.print(f"[yellow]NOTE[/]: {escape(sentence)}", soft_wrap=True)


def _end_at_once(error: HangError, out: Path) -> NoReturn:
    """Ends this process: whatever waits for the GPU, as the end of a program does, would wait for the kernel."""
    from vllm_spark.tune.results import is_vllms_choice

    further = f"it is noted in {out}, and the same command goes on without it"
    if is_vllms_choice(error.parameters):
        further = "that is vLLM's own choice, and without it there is nothing to compare with; serving may hang as well"
    print(f"{PROGRAM}: {error}; {further}.", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(error.exit_code)


@contextmanager
def _told_when_stopped(console: Console, kept: Callable[[], str]) -> Iterator[None]:
    """Says what is kept when Ctrl-C or another signal ends what is inside."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        console.print(f"Stopped: {kept()}.", soft_wrap=True)
        raise


def _check_folder(folder: Path, option: str) -> None:
    """Raises ConfigurationError if `folder`, given by `option`, cannot be made or written, and makes nothing yet."""
    try:
        parent = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    except OSError as error:
        raise ConfigurationError(
            f"the folder {folder} cannot be written ({error.strerror}); give another with {option}"
        ) from None
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what = "is protected" if parent.is_dir() else "is a file"
        raise ConfigurationError(f"the folder {folder} cannot be written: {parent} {what}; give another with {option}")


def _compare(
    config: dict[str, Any],
    model: TunedModel,
    engine: dict[str, Any],
    candidates: list[NewTable],
    args: argparse.Namespace,
    console: Console,
) -> list[Comparison]:
    """Decode steps with and without the candidates, in engines that see these tables and no other of this user's."""
    from vllm_spark.processes.group import process_group
    from vllm_spark.tune.decode_comparison import Settings, compare
    from vllm_spark.tune.tuner import store

    progress = Progress(
        *Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn(), transient=True
    )
    logs = None if args.keep_logs is None else args.keep_logs / f"tp{model.tp}"
    with process_group("tune", console, logs) as stage, progress:
        folder = stage.folder / "config" / "vllm-spark" / "tuned"
        store(candidates, folder)
        task = progress.add_task("decoding", total=2 * args.rounds)
        settings = Settings(config, model.tp, folder, rounds=args.rounds, engine=engine, timeout=args.timeout)
        started = 0

        def show(side: str, number: int) -> None:
            nonlocal started
            progress.update(task, completed=started, description=f"decoding TP={model.tp}, round {number + 1}: {side}")
            started += 1

        return compare(settings, stage, show, lambda sentence: _note(console, sentence))


def _comparison_table(label: str, comparisons: list[Comparison], where: str) -> Table:
    from vllm_spark.tune.keeping import is_kept

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
