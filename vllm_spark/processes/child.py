"""Parent and child processes: starting a module of this project, ending with the parent, and detecting vLLM's engine.

For the parent: `python_module` and `end_with_parent`. For the child: `watch_parent` and `in_engine_process`.
"""

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
"""Seconds in which a process must end after SIGKILL: the kernel waits for a running disk read."""

_PR_SET_PDEATHSIG = 1
_ENGINE_MAIN = ("vllm.v1.engine.core", "run_engine_core")  # module and main function of vLLM's engine process
# Keeps a folder named vllm_spark in the working directory from being imported (Python 3.11 and later).
_SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []


def python_module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of this project with the running Python."""
    return [sys.executable, *_SAFE_PATH, "-m", name, *arguments]


def end_with_parent(parent: int) -> Callable[[], None]:
    """A `preexec_fn` that makes the kernel kill the child when its parent ends, for whatever cause."""
    libc = ctypes.CDLL(None, use_errno=True)

    def set_death_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the call
            os._exit(EXIT_LOST)

    return set_death_signal


def in_engine_process() -> bool:
    """Whether this thread runs the main function of vLLM's engine process."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == _ENGINE_MAIN:
            return True
        frame = frame.f_back
    return False


def watch_parent(on_death: Callable[[], None]) -> None:
    """Calls `on_death`, in a thread of its own, when the parent process ends, for whatever cause.

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
