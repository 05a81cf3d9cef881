"""The thread that carries announcements of a link's state out of band, and logs what happens to its rails."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("vllm_spark")

Announce = Callable[[bytes], None]
"""Sends some 800 bytes to the peer, whose runtime gets them by `deliver`. Must not wait; what fails is lost."""


class LinkKeeper(threading.Thread):
    """Sleeps until a native runtime with rails has something to say; ends with `stop`."""

    def __init__(self, native: Any, announce: Announce) -> None:
        super().__init__(name="spark-link", daemon=True)
        self._native, self._announce = native, announce
        self._end = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False

    def run(self) -> None:
        """The thread's loop."""
        poll = select.poll()
        poll.register(self._native.link_ready, select.POLLIN)
        poll.register(self._end, select.POLLIN)
        while not self._stopping:
            poll.poll()
            self._pass_on()
        self._pass_on()  # what came while it was told to stop: the farewell

    def stop(self) -> None:
        """Passes on what is left, and ends the thread; waits for it a second at most."""
        self._stopping = True
        os.eventfd_write(self._end, 1)
        if threading.current_thread() is not self:
            self.join(1.0)
            if not self.is_alive():
                os.close(self._end)

    def _pass_on(self) -> None:
        announcement = self._native.take_announcement()
        for sentence in self._native.take_log():
            logger.warning("%s.", sentence[:1].upper() + sentence[1:])
        if announcement:
            # A way that is closed by now has told both sides so; rails that work carry the same words.
            with contextlib.suppress(Exception):
                self._announce(announcement)
