"""SIGINT and SIGTERM during a start, which may wait for the other machine for minutes.

vLLM's engine only takes a note of them until it has started, and its API server swallows the first one while it waits
for its engine. Here they raise, so that whatever waits is left at once and everything is released on the way.
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


class StopRequest(BaseException):
    """A stop signal, on its way out: no handler of errors is meant to stop it, as with KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.error = StoppedError(f"stopped by {signal.Signals(number).name} before it served", number)


def raise_on_stop_signals() -> dict[signal.Signals, Any]:
    """Lets the stop signals raise StopRequest in the main thread from now on; returns the handlers before.

    Does nothing on another thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, _raise) for number in STOP_SIGNALS}


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """While active, the stop signals end the context.

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
