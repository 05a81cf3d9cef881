"""`vllm-spark tune`: searches the fastest parameters of Marlin and FusedMoE on this GPU, and checks tables."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_spark.cli import PROGRAM
from vllm_spark.cli.arguments import engine_arguments, positive, positives, user_path, wide_console
from vllm_spark.errors import EXIT_USAGE, ConfigurationError
from vllm_spark.tune.plan import LARGEST_ROWS, TuningOptions, prepare

if TYPE_CHECKING:
    from vllm_spark.kernels.check import CheckReport
    from vllm_spark.kernels.fused_moe.published import LeftOut
    from vllm_spark.tune.coverage import Use
    from vllm_spark.tune.timing import HangError

SUMMARY = "find the fastest parameters of a model's experts on this GPU, and check tables of them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `vllm-spark tune`."""
    _add_tuning_arguments(parser)
    parser.epilog = "exit code of --check: 0 all is well, 1 a table has an error, 2 wrong usage"
    parser.add_argument(
        "--check",
        nargs="*",
        type=user_path,
        metavar="FOLDER",
        help="check every table in these folders, without a GPU; default: those of this project, and your own",
    )
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="with --check: compile no kernels, which takes about a second for each distinct row",
    )
    parser.add_argument(
        "--json", action="store_true", help="with --check: print one JSON object to standard output, and nothing else"
    )


def _add_tuning_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-spark tune MODEL`."""
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
        help="tokens of a decode step, up to 8; larger steps use vLLM's defaults (default: 1 to 8)",
    )
    parser.add_argument(
        *("--output", "--out"),
        dest="out",
        type=user_path,
        metavar="FOLDER",
        help="default: the folder that `vllm serve --spark` reads",
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        metavar="N",
        default=4,
        help="engines that each side decodes with; the sides alternate in running first (default: 4)",
    )
    parser.add_argument(
        "--no-decode", dest="decode", action="store_false", help="use the kernels' times only, without starting engines"
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

    times = parser.add_argument_group("rows from times that were measured elsewhere, without a GPU")
    times.add_argument(
        "--from-times",
        type=user_path,
        metavar="FILE",
        help="comma-separated times of the Triton kernel for the model's experts (columns: M, BLOCK_M, BLOCK_N, "
        "BLOCK_K, GROUP_M, num_warps, num_stages, kernel_us); writes a table of the rows that are faster than "
        "vLLM's choice by their medians",
    )
    times.add_argument("--source", metavar="TEXT", help="where the times come from, for the table's provenance")
    times.add_argument(
        "--device", default=None, metavar="NAME", help="GPU they were measured on (default: NVIDIA_GB10)"
    )


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positives(text)))


def _rows(text: str) -> tuple[int, ...]:
    rows = sorted(set(positives(text)))
    if max(rows) > LARGEST_ROWS:
        raise argparse.ArgumentTypeError(f"{max(rows)} is more than {LARGEST_ROWS} tokens, the largest step of a table")
    return tuple(rows)


def run(args: argparse.Namespace) -> int:
    """Tunes a model, or checks tables.

    Raises:
        SparkError: there is nothing to do, a folder does not exist, or the search failed.
    """
    if args.check is not None:
        if args.model is not None:
            raise ConfigurationError(
                f"a model ({args.model}) and --check exclude each other: tables are checked for all models; give a "
                "folder of tables right after --check"
            )
        return _check(args)
    if args.model is None:
        raise ConfigurationError("give a model or --check: vllm-spark tune MODEL, or vllm-spark tune --check")
    for option in ("json", "no_compile"):
        if getattr(args, option):
            raise ConfigurationError(f"--{option.replace('_', '-')} is an option of --check; leave it out")
    if args.from_times is not None:
        return _table_from_times(args)
    for option in ("source", "device"):
        if getattr(args, option) is not None:
            raise ConfigurationError(f"--{option} is an option of --from-times; leave it out")
    return _tune(args)


def _table_from_times(args: argparse.Namespace) -> int:
    from vllm_spark.tune.fused_moe.times_table import write_table

    if args.source is None:
        raise ConfigurationError("--from-times needs --source, the place where the times come from")
    console = wide_console()
    given = {name: getattr(args, name) for name in ("model", "tp", "source", "device", "out")}
    outcome = write_table(**given, times=args.from_times, on_note=lambda note: console.print(escape(note)))
    console.print(outcome.table)
    if outcome.path is None:
        console.print("No row is faster than vLLM's choice by these times; no table was written.")
    else:
        console.print(f"Written: {escape(str(outcome.path))}", soft_wrap=True)
    return 0


def _tune(args: argparse.Namespace) -> int:
    names = [field.name for field in dataclasses.fields(TuningOptions)]
    options = TuningOptions(**{name: getattr(args, name) for name in names})
    plan, folder = prepare(options)
    from vllm_spark.tune.session import TuningSession, this_machine
    from vllm_spark.tune.timing import HangError

    session = TuningSession(options, plan, folder, this_machine(), wide_console())
    with _exit_on_signals():
        try:
            session.run()
        except HangError as error:
            _exit_at_once(error, folder)
    return 0


def _exit_at_once(error: HangError, folder: Path) -> NoReturn:
    """Exits without cleanup: the end of a program waits for the GPU, and so for the kernel."""
    from vllm_spark.tune.results import is_vllm_default

    further = f"it is recorded in {folder}, and the same command continues without it"
    if is_vllm_default(error.parameters):
        further = "that is vLLM's own choice, and without it there is nothing to compare with; serving may hang as well"
    print(f"{PROGRAM}: {error}; {further}.", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(error.exit_code)


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit inside, so that running compilers are stopped as on Ctrl-C."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _check(args: argparse.Namespace) -> int:
    from vllm_spark.kernels.check import check_tables
    from vllm_spark.kernels.lookup import shipped_folder, user_folder

    folders = list(args.check)
    uses: list[Use] = []
    left_out: list[LeftOut] = []
    if not folders:
        from vllm_spark.kernels.fused_moe.published import sets_left_out
        from vllm_spark.tune.coverage import uses as uses_of_known_models

        uses, left_out = uses_of_known_models(), sets_left_out(shipped_folder())
        own = user_folder()
        folders = [shipped_folder(), *([own] if own is not None and _may_be_there(own) else [])]
    if not args.json:
        console = Console(stderr=True)
        with console.status(f"checking tables in {', '.join(map(str, folders))}"):
            report = check_tables(folders, compile_kernels=not args.no_compile)
        _show(report, folders)
        _show_uses(uses)
        _show_left_out(left_out)
    else:
        report = check_tables(folders, compile_kernels=not args.no_compile)
        print(_to_json(report, uses, left_out), flush=True)
    if not report.tables:
        return EXIT_USAGE
    return 1 if report.failed else 0


def _may_be_there(folder: Path) -> bool:
    """Whether the folder exists, or cannot be read, which the check reports."""
    try:
        return folder.is_dir()
    except OSError:
        return True


def _show(report: CheckReport, folders: list[Path]) -> None:
    """Prints the findings as a table, then what was checked and what was not."""
    console = Console(highlight=False)
    if report.findings:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("")
        table.add_column("table", overflow="fold", ratio=3)
        table.add_column("tokens", overflow="fold", ratio=1)
        table.add_column("finding", overflow="fold", ratio=4)
        for (path, kind, sentence), rows in _grouped(report).items():
            colour = "red" if kind == "error" else "yellow"
            table.add_row(f"[{colour}]{kind}[/]", escape(path.name), ", ".join(map(str, rows)), escape(sentence))
        console.print(table)
        console.print()
    _show_contents(console, report)
    for sentence in report.unchecked:
        console.print(f"[yellow]NOT CHECKED[/]: {escape(sentence)}", soft_wrap=True)
    if report.compiler is not None:
        console.print(f"Kernels were compiled with Triton {report.compiler}.")
    errors = sum(finding.kind == "error" for finding in report.findings)
    places = ", ".join(map(str, folders))
    if not report.tables:
        console.print(f"There is no table in {escape(places)}.", soft_wrap=True)
        return
    verdict = f"[red]{errors} error{'s' if errors > 1 else ''}[/]" if errors else "[green]no errors[/]"
    count = f"{len(report.tables)} table{'s' if len(report.tables) > 1 else ''}"
    console.print(f"{count} in {escape(places)}: {verdict}.", soft_wrap=True)


def _show_contents(console: Console, report: CheckReport) -> None:
    """Prints the rows of each table by provenance."""
    from vllm_spark.kernels.table import origins

    if not report.contents:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("table", "rows with an effect", "vLLM's choice"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "vLLM's choice" else "left")
    for content in report.contents:
        tuned = origins(content.tuned.values())
        steps = _ranges(content.tuned)
        tokens = f": for {steps} token{'' if steps == '1' else 's'}" if content.tuned else ""
        table.add_row(escape(content.table.name), escape(tuned + tokens), f"{content.default} rows")
    console.print(table)
    console.print()


def _ranges(numbers: Iterable[int]) -> str:
    """`1-8, 16`."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][-1] == number - 1:
            found[-1] = [found[-1][0], number]
        else:
            found.append([number])
    return ", ".join("-".join(map(str, each)) for each in found)


def _show_uses(uses: Sequence[Use]) -> None:
    """Prints what serving uses on a GB10 for each shape of the known models, with the reasons below."""
    if not uses:
        return
    console = Console(highlight=False)
    table = Table(title="On a GB10", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("kernel", "shape of one rank", "models", "used", "why"):
        table.add_column(heading, overflow="fold")
    reasons: dict[str, int] = {}
    for use in uses:
        number = reasons.setdefault(use.why, len(reasons) + 1)
        table.add_row(use.kernel, escape(use.shape), escape(", ".join(use.models)), escape(use.what), f"({number})")
    console.print()
    console.print(table)
    for reason, number in reasons.items():
        console.print(f"({number}) {escape(reason)}.", soft_wrap=True)


def _show_left_out(sets: Sequence[LeftOut]) -> None:
    if not sets:
        return
    console = Console(highlight=False)
    table = Table(title="Left out", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("published set", "grade", "shape", "why"):
        table.add_column(heading, overflow="fold")
    for each in sets:
        shape = f"E={each.experts}, N={each.size_n}, {each.dtype or 'bfloat16'}"
        blocks = "" if each.block_shape is None else " in blocks"
        table.add_row(escape(each.source), each.grade, escape(shape + blocks), escape(each.reason))
    console.print()
    console.print(table)


def _grouped(report: CheckReport) -> dict[tuple[Path, str, str], list[int]]:
    """Rows of a table that have the same finding."""
    found: dict[tuple[Path, str, str], list[int]] = {}
    for finding in report.findings:
        rows = found.setdefault((finding.table, finding.kind, finding.sentence), [])
        if finding.row is not None:
            rows.append(finding.row)
    return found


def _to_json(report: CheckReport, uses: Sequence[Use], left_out: Sequence[LeftOut]) -> str:
    return json.dumps(
        {
            "tables": [str(path) for path in report.tables],
            "rows": [
                {
                    "table": str(content.table),
                    "tuned": {
                        str(rows): None if source is None else source.model_dump(mode="json", exclude_defaults=True)
                        for rows, source in content.tuned.items()
                    },
                    "default": content.default,
                }
                for content in report.contents
            ],
            "uses": [
                dataclasses.asdict(use) | {"table": None if use.table is None else str(use.table)} for use in uses
            ],
            "left_out": [each.model_dump(mode="json") for each in left_out],
            "findings": [
                {"table": str(found.table), "tokens": found.row, "kind": found.kind, "sentence": found.sentence}
                for found in report.findings
            ],
            "compiler": report.compiler,
            "unchecked": list(report.unchecked),
            "failed": report.failed,
        },
        indent=2,
    )
