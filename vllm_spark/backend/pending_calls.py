"""Calls that vLLM's client has made to its engine and that wait for an answer when the engine ends.

vLLM fails the requests of a dead engine, but nothing ends the wait for its other calls (which tasks it supports, an
adapter, `collective_rpc`): a server that was about to serve, or a program with an `LLM`, would wait without end.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from concurrent.futures import Future, InvalidStateError
from typing import Any

logger = logging.getLogger("vllm_spark")

INTERVAL = 0.5
"""Seconds between two readings of whether the engine has ended."""


def fail_calls_of_dead_engine(client: Any) -> None:
    """Starts a thread that ends the waits of `client` once its engine has ended; it ends with the client.

    Args:
        client: vLLM's `MPClient`; the thread has a weak reference to it.
    """
    reference = weakref.ref(client)
    threading.Thread(target=_watch, args=(reference, client.resources), name="spark-pending-calls", daemon=True).start()


def _watch(reference: weakref.ref[Any], resources: Any) -> None:
    while not resources.engine_dead:
        if reference() is None:
            return
        time.sleep(INTERVAL)
    client = reference()
    if client is None:
        return
    # A call stores its future first and then looks whether the engine is dead, so none is missed.
    for future in client.utility_results.copy().values():
        _fail(future)


def _fail(future: Any) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    def fail() -> None:
        try:
            future.set_exception(EngineDeadError(suppress_context=True))
        except (asyncio.InvalidStateError, InvalidStateError):
            logger.debug("A call was answered before its engine ended.")

    if isinstance(future, Future):
        fail()
        return
    try:
        future.get_loop().call_soon_threadsafe(fail)
    except RuntimeError:
        logger.debug("The event loop of a call has ended before its engine.")
