"""Processes that a fork server starts, and the choice of what it starts; `fork_server` says how they are made."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import psutil

from vllm_spark.processes.child import python_module
from vllm_spark.processes.local import CPU_ENVIRONMENT
from vllm_spark.processes.managed import Process, ProcessError, clean_environment

from .fork_server import EXIT_CODE, SPARE_TITLE, Order, is_forked, read_late, send_order

ROOT = Path(__file__).parents[2]

IMPORT_SECONDS = 120.0
"""Bound for the import of vLLM on a busy machine."""


class ForkServer:
    """A process that has imported vLLM and forks others from itself.

    Args:
        prefix: what is put before its command, to start it on a host.
        log: file for what it prints.
    """

    def __init__(self, prefix: Sequence[str], log: Path) -> None:
        self.environment = clean_environment() | CPU_ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
        self._connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.settimeout(IMPORT_SECONDS)
        argv = [*prefix, *python_module("tests.serve.fork_server", str(other.fileno()))]
        with other, log.open("wb") as output:
            self._log = log
            self._popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                pass_fds=[other.fileno()],
                start_new_session=True,
            )

    def suits(self, argv: Sequence[str], environment: Mapping[str, str]) -> bool:
        """Whether a process forked from this one is as one that is started with this command and environment."""
        return is_forked(argv) and read_late(environment, self.environment)

    def fork(self, argv: Sequence[str], output: BinaryIO, environment: Mapping[str, str]) -> Forked:
        """Starts a process.

        Raises:
            ProcessError: the server has ended.
        """
        exit_code, told = os.pipe()
        with open(os.devnull, "rb") as nothing:
            descriptors = [nothing.fileno(), output.fileno(), output.fileno(), told]
            try:
                pid = send_order(self._connection, Order(list(argv), dict(environment), [0, 1, 2]), descriptors)
            except OSError as error:
                os.close(exit_code)
                raise ProcessError(f"the fork server: {error}: {self._log.read_text(errors='replace')}") from error
            finally:
                os.close(told)
        return Forked(argv, pid, exit_code)

    def close(self) -> None:
        """Ends it; processes that it has forked go on."""
        self._connection.close()
        try:
            self._popen.wait(IMPORT_SECONDS)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


class Forked:
    """A forked process: a `Child` of a `Process`."""

    def __init__(self, argv: Sequence[str], pid: int, exit_code: int) -> None:
        self.args, self.pid = argv, pid
        self.returncode: int | None = None
        self._exit_code = os.fdopen(exit_code, "rb", buffering=0)

    def poll(self) -> int | None:
        """The exit code, minus a signal's number; None while it runs."""
        return self._ended_within(0)

    def wait(self, timeout: float) -> int:
        """The exit code; raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while (code := self._ended_within(max(0.0, deadline - time.monotonic()))) is None:
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(list(self.args), timeout)
        return code

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _ended_within(self, seconds: float) -> int | None:
        if self.returncode is None and select.select([self._exit_code], [], [], seconds)[0]:
            content = self._exit_code.read(EXIT_CODE.size)
            if not content:
                raise ProcessError(f"the fork server ended before process {self.pid}")
            (self.returncode,) = EXIT_CODE.unpack(content)
            self._exit_code.close()
        return self.returncode


class ForkedProcess(Process):
    """A `Process` that a fork server starts instead of an interpreter of its own."""

    def __init__(
        self, server: ForkServer, name: str, argv: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> None:
        self._server = server
        super().__init__(name, argv, log, environment)

    def descendants(self) -> list[psutil.Process]:
        """As ever, without the spare processes, which end with those that they are spare for."""
        return [process for process in super().descendants() if not _is_spare(process)]

    def _start(self, output: BinaryIO, environment: Mapping[str, str] | None, end_with_starter: bool) -> Forked:
        assert environment is not None
        assert not end_with_starter, "the fork server is the parent"
        return self._server.fork(self.argv, output, environment)


def _is_spare(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[:1] == [SPARE_TITLE]
    except psutil.NoSuchProcess:
        return True
