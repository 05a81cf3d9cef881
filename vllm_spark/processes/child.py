"""What the Python processes that this project starts have in common: they end with it, and import what it imports."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from vllm_spark.errors import EXIT_LOST

KILL_SECONDS = 10.0
"""How long the kernel may take to end what was sent SIGKILL: a process in a long disk read takes a moment."""

_PR_SET_PDEATHSIG = 1
# A folder named vllm_spark where the user happens to be must not become the child's package (Python 3.11 and later).
_SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []


def python_module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of this project, with the Python that runs this."""
    return [sys.executable, *_SAFE_PATH, "-m", name, *arguments]


def end_with_parent(parent: int) -> Callable[[], None]:
    """A child's first act: ask the kernel to kill it when its parent dies, by whatever cause."""
    libc = ctypes.CDLL(None, use_errno=True)

    def arrange() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the kernel was asked
            os._exit(EXIT_LOST)

    return arrange


_MAIN_OF_AN_ENGINE = ("vllm.v1.engine.core", "run_engine_core")
"""The function, with its module, that vLLM runs in the process that it starts for an engine."""


def in_engine_process() -> bool:
    """Whether the caller runs, in this thread, inside what vLLM started a process for: an engine."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == _MAIN_OF_AN_ENGINE:
            return True
        frame = frame.f_back
    return False


def watch_parent(on_death: Callable[[], None]) -> None:
    """Calls `on_death`, in a thread of its own, when the process that started this one dies, by whatever cause.

    Does nothing in a process that was not started by another Python process.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return
    try:
        descriptor = os.pidfd_open(parent.pid)
    except ProcessLookupError:
        on_death()
        return

    def wait() -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
        on_death()

    threading.Thread(target=wait, name="spark-parent-watch", daemon=True).start()
