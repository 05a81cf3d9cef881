"""Gives an engine of a pair time to end its requests and to take leave of its follower when the server is stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch

GRACE_SECONDS = 5.0


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    def shutdown(self: Any, timeout: float | None = None) -> None:
        # None is vLLM's own five seconds. Zero kills at once, often before the engine has told anybody of the end of
        # its requests, and then their clients wait until they lose patience, and the server for them.
        original(self, timeout=timeout if timeout is None else max(timeout, GRACE_SECONDS))

    return shutdown


PATCH = Patch(
    name="engine-grace",
    anchor=Anchor("vllm.v1.engine.utils:CoreEngineProcManager.shutdown"),
    reason="vLLM asks its engine to end and kills it in the same breath, unless all requests are to be finished first",
    feature="an end for the requests of a server that is stopped",
    fingerprints={"df57f23d5501": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    when="leading",
)
