"""A program that runs in a machine."""

from __future__ import annotations

import re
import shlex
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import MachineError

if TYPE_CHECKING:
    from .machine import Machine

ANSWER_SECONDS = 120.0
"""How long the agent may take to answer: it shares its emulated processor with everything that a test runs."""


class CommandFailed(MachineError):
    """A command ended with another exit code than 0."""


@dataclass(frozen=True)
class Finished:
    """What a command came to: its exit code (minus the signal's number if one ended it) and what it printed."""

    exit_code: int
    stdout: str
    stderr: str
    output: str
    """Both, in the order in which they came."""


@dataclass
class Command:
    """A program running in a machine. Made by `Machine.start`."""

    machine: Machine
    id: int
    argv: tuple[str, ...]
    boot: int
    """Which boot of the machine it belongs to: it does not outlive that."""
    pid: int | None = None
    exit_code: int | None = None
    """None while it runs, else as `subprocess` has it."""
    failure: str | None = None
    chunks: list[tuple[str, str]] = field(default_factory=list, repr=False)
    """What it has printed: stream and text."""

    @property
    def output(self) -> str:
        """Everything it has printed so far."""
        return "".join(text for _, text in list(self.chunks))

    def printed(self, stream: str) -> str:
        """What it has printed so far to "stdout" or "stderr"."""
        return "".join(text for where, text in list(self.chunks) if where == stream)

    def wait(self, timeout: float) -> Finished:
        """Waits at most `timeout` seconds for its end.

        Raises:
            MachineError: it still runs, or the machine ended.
        """
        self.machine.wait_until(lambda: self.exit_code is not None, timeout, f"{self} has not ended", self)
        assert self.exit_code is not None
        return Finished(self.exit_code, self.printed("stdout"), self.printed("stderr"), self.output)

    def wait_for_line(self, pattern: str, timeout: float) -> re.Match[str]:
        """Waits at most `timeout` seconds until its output holds a match of the regular expression.

        Raises:
            MachineError: it ended without, the time is over, or the machine ended.
        """
        compiled = re.compile(pattern, re.MULTILINE)
        what = f"{self} has not printed {pattern!r}"
        self.machine.wait_until(lambda: compiled.search(self.output) or self.exit_code is not None, timeout, what, self)
        if (match := compiled.search(self.output)) is None:
            raise MachineError(f"{what} and ended with exit code {self.exit_code}{self.machine.last_words(self)}")
        return match

    def signal(self, number: int) -> None:
        """Sends a signal to it and to what it has started; nothing happens if it has ended."""
        self.machine.ask({"do": "signal", "id": self.id, "signal": int(number)})

    def kill(self, timeout: float = ANSWER_SECONDS) -> None:
        """Ends it at once, with what it has started, and waits for that.

        Raises:
            MachineError: it does not end, or the machine has.
        """
        self.signal(signal.SIGKILL)
        self.wait(timeout)

    def __str__(self) -> str:
        return f"`{shlex.join(self.argv)}` on {self.machine.name}"
