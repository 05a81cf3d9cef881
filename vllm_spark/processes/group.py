"""The programs that a subcommand starts: they end with it, and after a failure their logs are shown and kept."""

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
MAX_KEPT_LOGS = 5
"""Number of failures of one subcommand whose logs stay in the temporary folder."""
ERROR = re.compile(r"^(?:\(.*?\) ERROR .*?\] )?([\w.]*(?:Error|Exception)\b: .*|vllm serve --spark: .*)", re.MULTILINE)
"""A sentence of ours, or the last line of a traceback, also in the format of vLLM's engine log: the last lines of
vLLM's own output name only its wrapper."""


class ProcessGroup:
    """Programs that a subcommand runs, and folders for their files and logs; made by `process_group`.

    Attributes:
        folder: temporary; removed with the group.
        logs: the output of the programs, a file for each.
    """

    def __init__(self, folder: Path, logs: Path) -> None:
        self.folder = folder
        self.logs = logs
        self._processes: list[Process] = []
        self._running = 0

    @property
    def has_run(self) -> bool:
        """True if a program was started."""
        return bool(self._processes)

    @contextmanager
    def started(
        self, name: str, argv: Sequence[str], log: str, environment: Mapping[str, str] | None = None
    ) -> Iterator[Process]:
        """Starts a program, which is ended with the context, and by the kernel if this process is killed.

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
            # A second Ctrl-C does not interrupt this; it has a time limit.
            with _handling_signals((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN):
                process.terminate()

    def explain(self, console: Console) -> None:
        """Shows the errors and the last lines in the logs of the programs that ran last."""
        for process in self._processes:
            console.rule(f"{process.name}: errors and last lines of its log", style="red", align="left")
            for line in (*_errors(process.output()), "...", *process.tail(TAIL_LINES).splitlines()):
                console.print(printable(line), markup=False, soft_wrap=True)
        console.rule(style="red")


@contextmanager
def process_group(name: str, console: Console, keep_logs: Path | None = None) -> Iterator[ProcessGroup]:
    """The group of the subcommand `name`; SIGTERM and SIGHUP end it as Ctrl-C does.

    After a SparkError the logs are shown, and moved to a folder that stays.

    Args:
        keep_logs: a folder for the logs, which stay there in any case.

    Raises:
        ConfigurationError: `keep_logs` cannot be created or is not a folder.
    """
    with ExitStack() as stack:
        stack.enter_context(_handling_signals((signal.SIGTERM, signal.SIGHUP), _exit_on_signal))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"vllm-spark-{name}-")))
        group = ProcessGroup(folder, keep_logs or folder / "logs")
        try:
            group.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"--keep-logs {group.logs}: {error.strerror}; give a folder that you may write, or a new one"
            ) from error
        try:
            yield group
        except SparkError:
            if not group.has_run:
                raise
            group.explain(console)
            logs = keep_logs
            if logs is None:
                _remove_old_logs(Path(tempfile.gettempdir()), f"vllm-spark-{name}-logs-")
                logs = Path(shutil.move(group.logs, tempfile.mkdtemp(prefix=f"vllm-spark-{name}-logs-")))
            console.print(f"The logs are in {logs}", soft_wrap=True)
            raise


def _remove_old_logs(parent: Path, prefix: str) -> None:
    """Removes this user's oldest folders with that prefix, so that one more can be kept."""
    mine = []
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # another process may remove it too
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                mine.append((found.st_mtime, folder))
    for _, folder in sorted(mine, reverse=True)[MAX_KEPT_LOGS - 1 :]:
        shutil.rmtree(folder, ignore_errors=True)


def printable(text: str) -> str:
    """`text` without control characters: a model with random weights may generate them."""
    return "".join(letter if letter.isprintable() else "·" for letter in text)


def _errors(output: str) -> list[str]:
    """The first few different exceptions in a log; the cause comes first."""
    return list(dict.fromkeys(ERROR.findall(output)))[:ERROR_LINES]


def _exit_on_signal(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@contextmanager
def _handling_signals(numbers: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
