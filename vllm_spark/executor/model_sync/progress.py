"""Shows how far a copy is: a bar on a terminal, else lines in the log. Also measures its rate."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from vllm_spark.executor.handshake.messages import CopyState

logger = logging.getLogger("vllm_spark")

_STDERR = 2
_WINDOW = 10.0  # seconds over which the rate is measured
_WIDE = 120  # columns
_FIRST_LINE, _LINE_INTERVAL = 5.0, 15.0  # seconds to the first line of the log, and between two of them


class RateMeter:
    """The rate of a copy over the last ten seconds.

    Args:
        now: the clock.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._points = deque([(now(), 0)])

    def rate(self, done: int) -> float:
        """Bytes per second, once `done` bytes have arrived; 0 in the first second."""
        time_now = self._now()
        if time_now - self._points[-1][0] >= 0.5:
            self._points.append((time_now, done))
        while len(self._points) > 2 and time_now - self._points[1][0] > _WINDOW:
            self._points.popleft()
        since, before = self._points[0]
        return (done - before) / (time_now - since) if time_now - since >= 1.0 else 0.0


def size_text(count: float) -> str:
    """`12.3 GB`, in decimal units as disks have them."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def duration_text(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s`, `12 s`, or `0.8 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def state_text(state: CopyState) -> str:
    """`12.3 of 45.6 GB (27 %), 2.1 GB/s, 16 s left`."""
    percent = 100 * state.done // max(state.total, 1)
    text = f"{size_text(state.done)} of {size_text(state.total)} ({percent} %)"
    if state.rate > 0:
        text += f", {size_text(state.rate)}/s, {duration_text((state.total - state.done) / state.rate)} left"
    return text


class CopyDisplay:
    """Shows states as they come. A context manager; leaving it removes the bar.

    Args:
        title: what is shown before each state, such as "Copying from the leader".
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._started = time.monotonic()
        self._next_line = self._started + _FIRST_LINE
        self._bar: Progress | None = None
        self._stream: TextIO | None = None

    def __enter__(self) -> CopyDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._stream is not None:
            self._stream.close()

    def show(self, state: CopyState) -> None:
        """Shows a state, or leaves it out if the last one was a moment ago."""
        if os.isatty(_STDERR):
            self._show_bar(state)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_INTERVAL
            logger.info("%s: %s: %s.", self._title, state.what, state_text(state))

    def _show_bar(self, state: CopyState) -> None:
        if self._bar is None:
            # vLLM puts a prefix before each line that its processes write to `sys.stderr`.
            self._stream = os.fdopen(os.dup(_STDERR), "w", encoding="utf-8")
            console = Console(file=self._stream)
            state_columns = (BarColumn(bar_width=None), TextColumn("{task.fields[state]}"))
            # A narrow terminal has no room for the title, which a line of the log before has too.
            columns = (TextColumn("{task.description}"), *state_columns) if console.width >= _WIDE else state_columns
            self._bar = Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False, expand=True)
            self._bar.add_task(f"{self._title}: {state.what}", total=state.total, state="")
            self._bar.start()
            console.show_cursor(True)  # a process that is killed leaves the terminal as it is
        (task,) = self._bar.task_ids
        self._bar.update(task, completed=state.done, total=state.total, state=state_text(state))
