"""Child processes of the demo, the benchmarks and the tests: each in a session of its own, with its output in a file.

A server has children (vLLM's engine, its workers); `Process.terminate` ends all of them.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

import psutil

from vllm_spark.errors import SparkError
from vllm_spark.processes.child import KILL_SECONDS, end_with_parent
from vllm_spark.variables import OLD_PREFIX, PREFIX

T = TypeVar("T")

POLL_SECONDS = 0.1

_LONGEST_TURN = 0.5
"""Seconds of a turn of `wait_until` that count; a longer one shows that this process did not run."""
_MOST_TIMEOUTS = 3
"""How many times its timeout `wait_until` takes at most, whatever the machine does."""

LAUNCH_VARIABLES = re.compile(rf"{PREFIX}|{OLD_PREFIX}|(RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$")
"""Matches variables that make a process leader or follower: this project's settings and torchrun's variables."""

SETTING_VARIABLES = re.compile(rf"{LAUNCH_VARIABLES.pattern}|VLLM_")
"""Matches variables that change how a server works: the same, and vLLM's settings."""


class ProcessError(SparkError):
    """A program ended too early, or a condition was not met in time; `process` is that program."""

    def __init__(self, message: str, process: Process | None = None) -> None:
        super().__init__(message)
        self.process = process


class Child(Protocol):
    """The part of `subprocess.Popen` that `Process` needs."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Process:
    """A running program and the processes that it started.

    Args:
        name: its name in messages.
        argv: program and arguments.
        log: file for its standard output and error; overwritten.
        environment: its whole environment; default: this process's own.
        end_with_starter: the kernel kills it when the thread that started it ends, even by SIGKILL.

    Raises:
        ProcessError: the program could not be started.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        *,
        end_with_starter: bool = False,
    ) -> None:
        self.name = name
        self.argv = tuple(argv)
        self.log = log
        try:
            with log.open("wb") as output:
                self._popen = self._start(output, environment, end_with_starter)
        except OSError as error:
            raise ProcessError(f"{name} could not be started: {argv[0]}: {error.strerror}") from error
        self._seen: set[psutil.Process] = set()

    def _start(self, output: BinaryIO, environment: Mapping[str, str] | None, end_with_starter: bool) -> Child:
        return subprocess.Popen(
            self.argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=None if environment is None else dict(environment),
            start_new_session=True,
            preexec_fn=end_with_parent(os.getpid()) if end_with_starter else None,
        )

    @property
    def pid(self) -> int:
        """Process id, and the id of its session and process group."""
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs, else its exit code (minus the signal's number if a signal ended it)."""
        return self._popen.poll()

    def output(self) -> str:
        """Everything that it and its children have printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def tail(self, lines: int = 30) -> str:
        """The last lines of its output."""
        return "\n".join(self.output().splitlines()[-lines:])

    def descendants(self) -> list[psutil.Process]:
        """The running processes that it started, directly or not, also those whose parent has ended."""
        found = set(self._seen)
        with suppress(psutil.NoSuchProcess):
            found.update(psutil.Process(self.pid).children(recursive=True))
        for pid in psutil.pids():
            with suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                if pid != self.pid and os.getsid(pid) == self.pid:
                    found.add(psutil.Process(pid))
        self._seen = {process for process in found if _is_alive(process)}
        return sorted(self._seen, key=lambda process: process.pid)

    def wait(self, timeout: float) -> int:
        """Waits at most `timeout` seconds for its end and returns the exit code.

        Raises:
            ProcessError: it still runs.
        """
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ProcessError(f"{self.name} still runs after {timeout:g} s", self) from None

    def wait_for_line(self, pattern: str, timeout: float) -> re.Match[str]:
        """Waits until its output holds a match of the regular expression, at most `timeout` seconds.

        Raises:
            ProcessError: it ended without a match, or the time is over.
        """
        compiled = re.compile(pattern, re.MULTILINE)
        return self.wait_until(lambda: compiled.search(self.output()), timeout, f"printed {pattern!r}")

    def wait_until(self, condition: Callable[[], T | None], timeout: float, what: str) -> T:
        """Waits until `condition` returns something true, and returns that.

        Args:
            condition: asked ten times a second.
            timeout: seconds; those in which this process itself did not run, as on a machine that was stopped, count
                less.
            what: the condition in words, a participle, as in "the server has not WHAT".

        Raises:
            ProcessError: the program ended before, or the time is over.
        """
        last = begun = time.monotonic()
        waited = 0.0
        while True:
            ended = self.exit_code  # read first: output printed before its end still counts
            if value := condition():
                return value
            if ended is not None:
                raise ProcessError(f"{self.name} ended with exit code {ended} before it had {what}", self)
            now = time.monotonic()
            waited, last = waited + min(now - last, _LONGEST_TURN), now
            if waited > timeout or now - begun > _MOST_TIMEOUTS * timeout:
                raise ProcessError(f"{self.name} has not {what} within {timeout:g} s", self)
            time.sleep(POLL_SECONDS)

    def terminate(self, grace: float = 20.0) -> None:
        """Ends it and the processes that it started; does nothing if they have ended.

        SIGTERM goes to the program only, which ends its children; after `grace` seconds SIGKILL goes to all that are
        left.

        Raises:
            ProcessError: a process survived SIGKILL.
        """
        self.descendants()
        if self.exit_code is None:
            self._popen.terminate()
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and (self.exit_code is None or self.descendants()):
            time.sleep(POLL_SECONDS)
        self.kill9()

    def kill9(self) -> None:
        """Sends SIGKILL to it and the processes that it started.

        Raises:
            ProcessError: one of them still runs `KILL_SECONDS` later.
        """
        deadline = time.monotonic() + KILL_SECONDS
        while self.exit_code is None or self.descendants():
            if time.monotonic() > deadline:
                left = [process.pid for process in self.descendants()]
                raise ProcessError(f"{self.name} (process {self.pid}) survives SIGKILL, with children {left}", self)
            if self.exit_code is None:
                self._popen.kill()
            for process in self.descendants():
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            time.sleep(POLL_SECONDS / 10)


def program(name: str) -> str:
    """Path of a console script in the environment of the running Python.

    Raises:
        ProcessError: there is no such script.
    """
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise ProcessError(
            f"the program `{name}` is not installed in the environment of this Python: {path} does not exist"
        )
    return str(path)


def clean_environment(without: re.Pattern[str] = SETTING_VARIABLES) -> dict[str, str]:
    """This process's environment without the variables whose names match from their start."""
    return {name: value for name, value in os.environ.items() if not without.match(name)}


def answers(url: str) -> bool:
    """True if `url` returns status 200 within two seconds; without a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (HTTPException, OSError):
        return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
