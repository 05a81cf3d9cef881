"""SIGINT and SIGTERM during a start, which may wait for the other machine for minutes.

Until its start is complete, vLLM's engine only records them, and its API server ignores the first one while it waits
for its engine. Here they raise an exception, so that a wait ends at once and resources are released.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from vllm_spark.errors import StoppedError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest(SystemExit):
    """A stop signal.

    It is not an Exception, so that error handlers do not catch it, and it is a SystemExit, because event loops only log
    any other exception that a signal's handler raises while one of their callbacks runs.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.error = StoppedError(f"stopped by {signal.Signals(number).name} before it served", number)


def raise_on_stop_signals() -> dict[signal.Signals, Any]:
    """Makes the stop signals raise StopRequest in the main thread; returns the previous handlers.

    Does nothing on another thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, _raise) for number in STOP_SIGNALS}


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """A context that the stop signals end.

    Raises:
        StoppedError: one of them came.
    """
    before = raise_on_stop_signals()
    try:
        yield
    except StopRequest as request:
        raise request.error from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise StopRequest(number)
