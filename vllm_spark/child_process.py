"""What the Python processes that this project starts have in common: they end with it, and import what it imports."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

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
