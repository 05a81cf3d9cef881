"""What ends another thread's wait in `poll`, from any thread and at any time."""

from __future__ import annotations

import contextlib
import os
import threading


class EventFd:
    """A descriptor that is readable once `set` was called, until `clear`.

    After `close` both do nothing. Whoever comes late would otherwise write to a descriptor that is closed, or that is
    somebody else's by then.
    """

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The descriptor, for poll; -1 once closed."""
        return self._descriptor

    def set(self) -> None:
        """Wakes up who waits, or who waits next."""
        with self._lock:
            if self._descriptor >= 0:
                os.eventfd_write(self._descriptor, 1)

    def clear(self) -> None:
        """Forgets all ringing so far. For the thread that waits, before it looks for what it was woken up for."""
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._descriptor >= 0:
                os.eventfd_read(self._descriptor)

    def close(self) -> None:
        """Closes the descriptor; may be called again. Not while another thread polls it."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                os.close(descriptor)
