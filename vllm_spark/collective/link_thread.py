"""The thread that carries announcements of a link's state out of band, and logs what happens to its rails."""

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
"""Sends some 2300 bytes to the peer, whose runtime gets them by `deliver`. Must not wait; what fails is lost."""


class LinkThread(threading.Thread):
    """Sleeps until a native runtime with rails has something to say; ends with `stop`."""

    def __init__(self, native: Any, announce: Announce) -> None:
        super().__init__(name="spark-link", daemon=True)
        self._native, self._announce = native, announce
        self._end = EventFd()
        self._stopping = False

    def run(self) -> None:
        """The thread's loop."""
        try:
            poll = select.poll()
            poll.register(self._native.link_ready, select.POLLIN)
            poll.register(self._end, select.POLLIN)
            while not self._stopping:
                poll.poll()
                self._pass_on()
            self._pass_on()  # what came while it was told to stop: the farewell
        finally:
            self._end.close()

    def stop(self) -> None:
        """Passes on what is left, and ends the thread; waits for it a second at most. May be called again."""
        self._stopping = True
        self._end.set()
        if threading.current_thread() is not self:
            self.join(1.0)

    def _pass_on(self) -> None:
        announcement = self._native.take_announcement()
        for sentence in self._native.take_log():
            logger.warning("%s.", upper_first(sentence))
        if announcement:
            # A way that is closed by now has told both sides so; rails that work carry the same words.
            with contextlib.suppress(Exception):
                self._announce(announcement)
