"""An eventfd that ends another thread's wait in `poll`."""

from __future__ import annotations

import contextlib
import os
import threading


class EventFd:
    """A descriptor that is readable after `set`, until `clear`. Thread-safe.

    After `close` both do nothing: a late call would otherwise write to a closed descriptor, or to another file that has
    got its number.
    """

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The descriptor, for poll; -1 once closed."""
        return self._descriptor

    def set(self) -> None:
        """Makes the descriptor readable: ends the present wait in `poll`, or the next one."""
        with self._lock:
            if self._descriptor >= 0:
                os.eventfd_write(self._descriptor, 1)

    def clear(self) -> None:
        """Makes it unreadable again. For the waiting thread, before it checks what `set` was called for."""
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._descriptor >= 0:
                os.eventfd_read(self._descriptor)

    def close(self) -> None:
        """Closes the descriptor; may be called again. Not while another thread polls it."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                os.close(descriptor)
