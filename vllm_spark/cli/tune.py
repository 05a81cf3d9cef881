"""`vllm-spark tune`: the fastest parameters of Marlin and FusedMoE for a model on this GPU, and checks of tables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_spark.cli import tune_model
from vllm_spark.cli.arguments import user_path
from vllm_spark.errors import EXIT_USAGE, ConfigurationError

if TYPE_CHECKING:
    from vllm_spark.kernels.check import CheckReport

SUMMARY = "find the fastest parameters of a model's experts on this GPU, and check tables of them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `vllm-spark tune`."""
    tune_model.add_arguments(parser)
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


def run(args: argparse.Namespace) -> int:
    """Searches for a model, or checks tables.

    Raises:
        SparkError: there is nothing to do, a folder is not there, or the search cannot be made.
    """
    if args.check is not None:
        if args.model is not None:
            raise ConfigurationError(
                f"a model ({args.model}) and --check do not go together: tables are checked for all models; a folder "
                "of tables goes right after --check"
            )
        return _check(args)
    if args.model is None:
        raise ConfigurationError("say what to do: vllm-spark tune MODEL, or vllm-spark tune --check")
    for option in ("json", "no_compile"):
        if getattr(args, option):
            raise ConfigurationError(f"--{option.replace('_', '-')} belongs to --check; leave it out")
    return tune_model.run(args)


def _check(args: argparse.Namespace) -> int:
    from vllm_spark.kernels.check import check_tables
    from vllm_spark.kernels.lookup import shipped_folder, user_folder

    folders = list(args.check)
    if not folders:
        own = user_folder()
        folders = [shipped_folder(), *([own] if own is not None and _may_be_there(own) else [])]
    if not args.json:
        console = Console(stderr=True)
        with console.status(f"checking tables in {', '.join(map(str, folders))}"):
            report = check_tables(folders, compile_kernels=not args.no_compile)
        _show(report, folders)
    else:
        report = check_tables(folders, compile_kernels=not args.no_compile)
        print(_to_json(report), flush=True)
    if not report.tables:
        return EXIT_USAGE
    return 1 if report.failed else 0


def _may_be_there(folder: Path) -> bool:
    """Whether there is such a folder, or one that cannot be read, of which the check says so."""
    try:
        return folder.is_dir()
    except OSError:
        return True


def _show(report: CheckReport, folders: list[Path]) -> None:
    """Findings as a table, then what was checked and what was not."""
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


def _grouped(report: CheckReport) -> dict[tuple[Path, str, str], list[int]]:
    """Rows of a table of which the same is to be said."""
    found: dict[tuple[Path, str, str], list[int]] = {}
    for finding in report.findings:
        rows = found.setdefault((finding.table, finding.kind, finding.sentence), [])
        if finding.row is not None:
            rows.append(finding.row)
    return found


def _to_json(report: CheckReport) -> str:
    return json.dumps(
        {
            "tables": [str(path) for path in report.tables],
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
