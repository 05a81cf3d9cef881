"""Real processes for tests: what runs is known, so that a failing test can show its output."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from vllm_spark.processes.managed import POLL_SECONDS, Process, ProcessError

from .forked_process import ForkedProcess, ForkServer

__all__ = ["Process", "ProcessError", "assert_all_gone", "descendant", "end_all", "start", "started"]

started: list[Process] = []
"""Every process that a test module has started, newest last; `end_all` empties it between modules."""


def start(
    name: str, argv: Sequence[str], log: Path, environment: Mapping[str, str], server: ForkServer | None = None
) -> Process:
    """Starts a program, from a fork server if there is one; its output is shown if a test fails while it is known."""
    if server is None:
        process = Process(name, argv, log, environment)
    else:
        process = ForkedProcess(server, name, argv, log, environment)
    started.append(process)
    return process


def descendant(process: Process, command: str) -> psutil.Process:
    """The one process among the descendants of `process` whose command line contains `command`.

    What that process starts shows the same command line for a moment, between fork and exec; it does not count.
    """
    found = {}
    for child in process.descendants():
        with suppress(psutil.NoSuchProcess):
            if command in " ".join(child.cmdline()):
                found[child.pid] = (child, child.ppid())
    (only,) = (child for child, parent in found.values() if parent not in found)
    return only


def end_all() -> None:
    """Ends what a module's tests have left running, and forgets them: the next failures are not theirs."""
    while started:
        started.pop().kill9()


def assert_all_gone(*processes: Process, timeout: float = 10.0) -> None:
    """Fails the test if, `timeout` seconds from now, one of the processes or of their children still runs."""
    deadline = time.monotonic() + timeout
    while (left := list(_alive(processes))) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    assert not left, f"still running: {'; '.join(left)}"


def _alive(processes: Sequence[Process]) -> Iterator[str]:
    for process in processes:
        if process.exit_code is None:
            yield f"{process.name} (process {process.pid})"
        for child in process.descendants():
            yield f"a child of {process.name} (process {child.pid})"
