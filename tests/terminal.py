"""Programs on a terminal of a given width."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from typing_extensions import Self

_ROWS = 50
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_POLL_SECONDS = 0.05
_END_SECONDS = 30.0


class TerminalProgram:
    """A program whose input and output are a terminal; ended with its context.

    Args:
        argv: program and arguments.
        columns: the terminal's width.
        environment: its whole environment.
    """

    def __init__(self, argv: Sequence[str], columns: int, environment: Mapping[str, str]) -> None:
        self._screen, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
        self._shown = b""
        unset = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"}
        kept = {name: value for name, value in environment.items() if name not in unset} | {"TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            argv, stdin=inside, stdout=inside, stderr=inside, env=kept, start_new_session=True
        )
        os.close(inside)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(_END_SECONDS)
        self._reader.join(_END_SECONDS)
        os.close(self._screen)

    @property
    def lines(self) -> list[str]:
        """What it has printed so far, without control sequences and without blanks at the ends of lines."""
        text = _CONTROL.sub("", self._shown.decode(errors="replace"))
        return [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]

    def wait_for(self, pattern: str, timeout: float) -> None:
        """Waits until a line matches; an AssertionError after `timeout` seconds, or if it ends before."""
        deadline = time.monotonic() + timeout
        while not any(re.search(pattern, line) for line in self.lines):
            lasts = self._reader.is_alive() and time.monotonic() < deadline
            assert lasts, "\n".join([f"no line with {pattern!r} in:", *self.lines])
            time.sleep(_POLL_SECONDS)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._screen, 1 << 16)
            except OSError:  # all its ends are closed
                return
            if not data:
                return
            self._shown += data


def shown_on_terminal(argv: Sequence[str], columns: int, environment: Mapping[str, str], timeout: float) -> list[str]:
    """The lines that a program prints until its end, which must be a success within `timeout` seconds."""
    with TerminalProgram(argv, columns, environment) as program:
        code = program.process.wait(timeout)
        program._reader.join(timeout)
        assert code == 0, "\n".join(program.lines)
        return program.lines
