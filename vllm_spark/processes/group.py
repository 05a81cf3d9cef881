"""The programs that a subcommand starts: they end with it, and when it fails their logs are shown and kept."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console

from vllm_spark.errors import ConfigurationError, SparkError
from vllm_spark.processes.managed import Process

TAIL_LINES = 12
ERROR_LINES = 6
KEPT_LOGS = 5
"""Failures of one subcommand whose logs stay in the temporary folder."""
ERROR = re.compile(r"^(?:\(.*?\) ERROR .*?\] )?([\w.]*(?:Error|Exception)\b: .*|vllm serve --spark: .*)", re.MULTILINE)
"""A sentence of ours, or the last line of a traceback, also as vLLM's engine logs it: vLLM's own last words name only
its wrapper."""


class ProcessGroup:
    """Programs that belong together, and a folder for what they need and print; made by `process_group`.

    Attributes:
        folder: temporary; gone with the stage.
        logs: what the programs print, a file for each.
    """

    def __init__(self, folder: Path, logs: Path) -> None:
        self.folder = folder
        self.logs = logs
        self._processes: list[Process] = []
        self._running = 0

    @property
    def has_run(self) -> bool:
        """True if a program was started on it."""
        return bool(self._processes)

    @contextmanager
    def started(
        self, name: str, argv: Sequence[str], log: str, environment: Mapping[str, str] | None = None
    ) -> Iterator[Process]:
        """One program, ended when the context is left, and by the kernel if this process is killed.

        Raises:
            ProcessError: it could not be started.
        """
        if self._running == 0:
            self._processes.clear()
        process = Process(name, argv, self.logs / log, environment, end_with_starter=True)
        self._processes.append(process)
        self._running += 1
        try:
            yield process
        finally:
            self._running -= 1
            # A second Ctrl-C does not stop this half-way, for it is bounded.
            with _signals((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN):
                process.terminate()

    def explain(self, console: Console) -> None:
        """Shows what the logs of the programs that ran last say about a failure."""
        for process in self._processes:
            console.rule(f"{process.name}: errors and last lines of its log", style="red", align="left")
            for line in (*_errors(process.output()), "...", *process.tail(TAIL_LINES).splitlines()):
                console.print(printable(line), markup=False, soft_wrap=True)
        console.rule(style="red")


@contextmanager
def process_group(name: str, console: Console, keep_logs: Path | None = None) -> Iterator[ProcessGroup]:
    """A stage for the subcommand `name`; SIGTERM and SIGHUP end it as Ctrl-C does.

    When a SparkError passes, the logs are shown, and moved to where they stay.

    Args:
        keep_logs: a folder for the logs, which stay there in any case.

    Raises:
        ConfigurationError: `keep_logs` cannot be a folder for them.
    """
    with ExitStack() as stack:
        stack.enter_context(_signals((signal.SIGTERM, signal.SIGHUP), _leave))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"vllm-spark-{name}-")))
        stage = ProcessGroup(folder, keep_logs or folder / "logs")
        try:
            stage.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"--keep-logs {stage.logs}: {error.strerror}; give a folder that you may write, or a new one"
            ) from error
        try:
            yield stage
        except SparkError:
            if not stage.has_run:
                raise
            stage.explain(console)
            logs = keep_logs
            if logs is None:
                _remove_old_logs(Path(tempfile.gettempdir()), f"vllm-spark-{name}-logs-")
                logs = Path(shutil.move(stage.logs, tempfile.mkdtemp(prefix=f"vllm-spark-{name}-logs-")))
            console.print(f"The logs are in {logs}", soft_wrap=True)
            raise


def _remove_old_logs(parent: Path, prefix: str) -> None:
    """Makes room for the logs of one more failure: this user's newest folders of that prefix stay, the others go."""
    mine = []
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # another program of this user may remove it too
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                mine.append((found.st_mtime, folder))
    for _, folder in sorted(mine, reverse=True)[KEPT_LOGS - 1 :]:
        shutil.rmtree(folder, ignore_errors=True)


def printable(text: str) -> str:
    """`text` without what would move the cursor or ring the bell: a random model writes such bytes too."""
    return "".join(letter if letter.isprintable() else "·" for letter in text)


def _errors(output: str) -> list[str]:
    """The first few different exceptions in a log: the cause stands above what it caused."""
    return list(dict.fromkeys(ERROR.findall(output)))[:ERROR_LINES]


def _leave(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@contextmanager
def _signals(numbers: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
