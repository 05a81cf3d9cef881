"""The options of `vllm-spark doctor --first-run`, and what it prints."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from vllm_spark.cli.arguments import add_sides, positive, user_path
from vllm_spark.config.settings import (
    SparkConfig,
    flag_name,
    given_flags,
    log_environment_warnings,
)
from vllm_spark.errors import ConfigurationError, upper_first
from vllm_spark.files import check_writable

if TYPE_CHECKING:
    from vllm_spark.first_run.result import StepResult

_MARKS = {
    "passed": ("ok", "green"),
    "warning": ("warning", "yellow"),
    "failed": ("FAILED", "bold red"),
    "stopped": ("STOPPED", "bold red"),
    "skipped": ("-", "dim"),
}
_OPTIONS = ("listen", "connect", "report", "collectives", "pull")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that go with --first-run."""
    group = parser.add_argument_group(
        "with --first-run", "Neither vllm-spark join nor vllm serve may be running. It takes an estimated 15 minutes."
    )
    add_sides(group, "run", required=False)
    group.add_argument(
        "--report",
        type=user_path,
        metavar="FILE",
        help="the report file (default: vllm-spark-first-run-HOST-TIME.json in the current folder)",
    )
    group.add_argument(
        "--collectives",
        type=positive,
        metavar="N",
        help="with --listen: number of random collectives at the end (default: 1000000 on GPUs, 10000 without)",
    )
    group.add_argument(
        "--pull", action="store_true", help="with --listen: ask for a cable to be pulled, and to be put back"
    )


def check_options(args: argparse.Namespace) -> None:
    """Raises ConfigurationError for an option that would have no effect."""
    given = [f"--{name}" for name in _OPTIONS if getattr(args, name)]
    if not args.first_run:
        if given:
            raise ConfigurationError(f"{given[0]} is an option of --first-run; add --first-run, or leave it out")
        return
    if not args.listen and not args.connect:
        raise ConfigurationError(
            "--first-run needs both machines; give --listen on one, and --connect with its address on the other"
        )
    if args.json:
        raise ConfigurationError("--json does not go with --first-run, which writes a file; use --report")
    flags = given_flags(args)
    if "leader" in flags:
        raise ConfigurationError(f"{flag_name('leader')} does not go with --first-run; use --connect")
    if args.connect:
        useless: list[str] = [name for name in given if name in ("--collectives", "--pull")]
        if useless or "address" in flags:
            raise ConfigurationError(
                f"{(useless or ['--address'])[0]} is an option of the machine with --listen; leave it out here"
            )


def run(args: argparse.Namespace, patience: float) -> int:
    """Runs all steps with the other machine.

    Args:
        args: the options.
        patience: seconds to wait for the other machine.

    Returns:
        The exit code, as of the doctor.

    Raises:
        SparkError: a bad setting, the machines did not connect, or the report cannot be written.
    """
    from vllm_spark.backend.logging import log_as
    from vllm_spark.executor.channel.addresses import host_name
    from vllm_spark.first_run.run import FirstRun, Request

    log_as("vllm-spark doctor")
    flags = given_flags(args)
    if args.connect:
        flags["leader"] = args.connect
    config = SparkConfig.resolve(flags=flags)
    log_environment_warnings()
    report = args.report or Path(f"vllm-spark-first-run-{_word(host_name())}-{time.strftime('%Y%m%d-%H%M%S')}.json")
    check_writable(report)
    console = Console(highlight=False)
    output = _Output(console)
    request = Request(args.listen, patience, report, args.collectives, args.pull)
    first_run = FirstRun(request, config, output.note, output.show)
    try:
        return first_run.run()
    finally:
        if first_run.report_written:
            console.print(Text(f"The report is in {report}."), soft_wrap=True)


class _Output:
    """The lines of a run on `console`."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def note(self, line: str) -> None:
        """Prints what happens now."""
        self._console.print(Text(f"          {upper_first(line)} ...", style="dim"), soft_wrap=True)

    def show(self, result: StepResult) -> None:
        """Prints a step's figure, and the sentence of one that did not pass."""
        mark, style = _MARKS[result.status]
        value = f": {result.value}" if result.value else ""
        line = Text(f"{mark:<10}", style=style).append(f"{result.title}{value} ({result.seconds:.1f} s)", "default")
        self._console.print(line, soft_wrap=True)
        if result.sentence:
            self._console.print(Text(f"          {upper_first(result.sentence)}."), soft_wrap=True)


def _word(text: str) -> str:
    return re.sub(r"[^\w-]", "_", text)
