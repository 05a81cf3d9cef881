"""Notices that the process that started this one is gone: vLLM's engine would live on, holding the model's memory."""

from __future__ import annotations

import multiprocessing
import os
import select
import threading
from collections.abc import Callable


def parent_process() -> int | None:
    """The process that started this engine; None if the engine runs inside the user's own process."""
    parent = multiprocessing.parent_process()
    return None if parent is None else parent.pid


def watch_parent(on_death: Callable[[], None]) -> None:
    """Calls `on_death`, in a thread of its own, when the process that started this one dies, by whatever cause.

    Does nothing in a process that was not started by another Python process.
    """
    parent = parent_process()
    if parent is None:
        return
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        on_death()
        return

    def wait() -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
        on_death()

    threading.Thread(target=wait, name="spark-parent-watch", daemon=True).start()
