"""Ends the requests of a server whose engine has ended, so that the server does not wait for their clients.

When vLLM's server is stopped it ends its engine, stops reading the engine's results, and then waits until every
response is complete. A request whose last result was not read by then has no end: always if the engine had to be
killed, and else by chance. The server would wait until the client's own time-out.
"""

from __future__ import annotations

import contextlib
import signal
import weakref
from collections.abc import Iterable
from typing import Any

_READ_SECONDS = 1.0
"""Time for the server to pass on results that it has received from an engine that ended in order."""

_apps: weakref.WeakSet[Any] = weakref.WeakSet()


def watch_requests(app: Any) -> None:
    """Lets `end_requests` end the requests of `app`, a FastAPI application of vLLM."""
    _apps.add(app)


def end_requests(processes: Iterable[Any]) -> None:
    """Ends, with vLLM's error for a dead engine, all requests that are unfinished now or in a second.

    May be called in any thread.

    Args:
        processes: the engine's, after their end: after a kill there is no result to wait for.
    """
    killed = any(process.exitcode in (None, -signal.SIGKILL) for process in processes)  # None: just killed
    for app in list(_apps):
        # vLLM deletes the state when an application ends: then no request is left.
        client = getattr(getattr(app, "state", None), "engine_client", None)
        handler = getattr(client, "output_handler", None)  # a task of the server's event loop; None before a request
        if handler is None:
            continue
        loop = handler.get_loop()
        with contextlib.suppress(RuntimeError):  # the loop is closed: no request is left
            if killed:
                loop.call_soon_threadsafe(_propagate, client)
            else:
                loop.call_soon_threadsafe(loop.call_later, _READ_SECONDS, _propagate, client)


def _propagate(client: Any) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    client.output_processor.propagate_error(EngineDeadError())
