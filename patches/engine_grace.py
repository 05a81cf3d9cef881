"""Gives an engine of a pair time to end its requests and its session when the server is stopped.

Records first that the engine is told to end: vLLM kills it if it has not ended after that time, which does not count as
a crash.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch

GRACE_SECONDS = 5.0


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    def shutdown(self: Any, timeout: float | None = None) -> None:
        from vllm_spark.backend.status import record_stop_request
        from vllm_spark.backend.unfinished_requests import end_requests

        record_stop_request()
        # None is vLLM's default of five seconds. Zero kills at once, often before the engine has ended its requests;
        # then their clients wait until they time out, and the server waits for the clients.
        original(self, timeout=timeout if timeout is None else max(timeout, GRACE_SECONDS))
        end_requests(self.processes)

    return shutdown


PATCH = Patch(
    name="engine-grace",
    anchor=Anchor("vllm.v1.engine.utils:CoreEngineProcManager.shutdown"),
    reason="vLLM kills its engine right after the request to end, unless it first finishes all requests",
    feature="an orderly end of requests when a server is stopped",
    fingerprints={"df57f23d5501": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    when="leading",
)
