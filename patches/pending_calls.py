"""Ends the wait for answers of an engine that has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    def start_engine_core_monitor(self: Any) -> None:
        from vllm_spark.backend.pending_calls import fail_calls_of_dead_engine

        original(self)
        fail_calls_of_dead_engine(self)

    return start_engine_core_monitor


PATCH = Patch(
    name="pending-calls",
    anchor=Anchor("vllm.v1.engine.core_client:MPClient.start_engine_core_monitor"),
    reason="vLLM's monitor notes that the engine has ended, and leaves the calls that wait for its answers waiting",
    feature="an end of the start, and of calls such as collective_rpc, when the engine ends before it answers",
    fingerprints={"425103dc3b37": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    when="leading",
)
