"""In whose process an engine runs: one that vLLM started for it, or the user's own.

vLLM's must end when its parent is gone, for it would live on, holding the model's memory. The user's is the user's:
it is not ended, and its signals are left alone, also where the user started it with multiprocessing.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import sys
import threading
from collections.abc import Callable
from types import FrameType

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
