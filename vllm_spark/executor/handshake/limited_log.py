"""Rate-limited log lines: the first few are logged, the others counted."""

from __future__ import annotations

import logging
import threading
from typing import NamedTuple

logger = logging.getLogger("vllm_spark")

_FIRST = 3
_MOST_KEYS = 64
_NAMED = 4  # addresses listed in a summary, each with its reason


class _Key(NamedTuple):
    peer: str
    reason: str


_OTHERS = _Key("other addresses", "various reasons")


class _Count:
    """The numbers for one peer and reason."""

    def __init__(self) -> None:
        self.logged = self.suppressed = self.recent = 0


class LimitedLog:
    """Logs the first lines for each peer and reason; one line per interval sums up the rest.

    The count of a peer whose lines stop for an interval starts again. At most 64 peers and reasons are counted
    separately, all others together. May be used from any thread.

    Args:
        what: what the lines are about, in the plural, for the summary.
        interval: seconds from the first line that is not logged to the summary.
        level: of all lines.
    """

    def __init__(self, what: str, interval: float = 60.0, level: int = logging.WARNING) -> None:
        self.total = 0
        self._what, self._interval, self._level = what, interval, level
        self._lock = threading.Lock()
        self._seen: dict[_Key, _Count] = {}
        self._timer: threading.Timer | None = None
        self._closed = False

    def add(self, peer: str, reason: str, sentence: str) -> None:
        """Logs `sentence`, or counts it if there were some from `peer` for this reason already."""
        with self._lock:
            self.total += 1
            key = _Key(peer, reason)
            if key not in self._seen and len(self._seen) >= _MOST_KEYS - 1:
                key = _OTHERS
            count = self._seen.setdefault(key, _Count())
            count.recent += 1
            shown = count.logged < (1 if key is _OTHERS else _FIRST)
            if shown:
                count.logged += 1
            else:
                count.suppressed += 1
            self._start_timer()
        if shown:
            logger.log(self._level, "%s", sentence)

    def summarize(self) -> None:
        """Logs one line about what was counted since the last one, if there is anything."""
        with self._lock:
            found = {key: count.suppressed for key, count in self._seen.items() if count.suppressed}
            self._seen = {key: count for key, count in self._seen.items() if count.recent}
            for count in self._seen.values():
                count.recent = count.suppressed = 0
            if self._seen:
                self._start_timer()
        if not found:
            return
        named = sorted((key for key in found if key is not _OTHERS), key=lambda key: -found[key])[:_NAMED]
        parts = [f"{found[key]} from {key.peer} ({key.reason})" for key in named]
        if rest := sum(found.values()) - sum(found[key] for key in named):
            parts.append(f"{rest} from {_OTHERS.peer} ({_OTHERS.reason})")
        logger.log(self._level, "%d more %s: %s.", sum(found.values()), self._what, ", ".join(parts))

    def close(self) -> None:
        """Logs what is left, and ends the timer; may be called again."""
        with self._lock:
            self._closed = True
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            if timer is not threading.current_thread():
                timer.join()
        self.summarize()

    def _start_timer(self) -> None:
        """Caller holds the lock."""
        if self._timer is None and not self._closed:
            self._timer = threading.Timer(self._interval, self._interval_ends)
            self._timer.name, self._timer.daemon = "spark-limited-log", True
            self._timer.start()

    def _interval_ends(self) -> None:
        with self._lock:
            self._timer = None
        self.summarize()
