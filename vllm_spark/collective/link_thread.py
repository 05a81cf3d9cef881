"""The thread that sends announcements of the link's state out of band, and logs the rails' changes."""

from __future__ import annotations

import contextlib
import logging
import select
import threading
from collections.abc import Callable
from typing import Any

from vllm_spark.errors import upper_first
from vllm_spark.processes.eventfd import EventFd

logger = logging.getLogger("vllm_spark")

Announce = Callable[[bytes], None]
"""Sends some 2300 bytes to the peer, which passes them to its runtime's `deliver`. Must not block; may fail."""


class LinkThread(threading.Thread):
    """Waits for announcements and log lines of a native runtime with rails; ended by `stop`."""

    def __init__(self, native: Any, announce: Announce) -> None:
        super().__init__(name="spark-link", daemon=True)
        self._native, self._announce = native, announce
        self._stop_requested = EventFd()
        self._stopping = False

    def run(self) -> None:
        """The thread's loop."""
        try:
            poll = select.poll()
            poll.register(self._native.link_ready, select.POLLIN)
            poll.register(self._stop_requested, select.POLLIN)
            while not self._stopping:
                poll.poll()
                self._forward()
            self._forward()  # the last announcement, made when the runtime was closed
        finally:
            self._stop_requested.close()

    def stop(self) -> None:
        """Forwards the last announcement, and ends the thread; waits for it at most a second. May be called again."""
        self._stopping = True
        self._stop_requested.set()
        if threading.current_thread() is not self:
            self.join(1.0)

    def _forward(self) -> None:
        announcement = self._native.take_announcement()
        for sentence in self._native.take_log():
            logger.warning("%s.", upper_first(sentence))
        if announcement:
            # If the channel is closed, both sides know; working rails carry the same announcement.
            with contextlib.suppress(Exception):
                self._announce(announcement)
