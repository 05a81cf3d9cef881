"""Selects this project's executor when an engine configuration with spark settings is created."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        # An earlier engine of this process whose start failed may still hold the port and the follower.
        if executor := sys.modules.get("vllm_spark.executor.leader_executor"):
            executor.abandon_unfinished_start()
        from vllm_spark.entrypoints.command_line import create_configuration

        return create_configuration(self, lambda: original(self, *args, **kwargs))

    return create_engine_config


PATCH = Patch(
    name="executor-choice",
    anchor=Anchor("vllm.engine.arg_utils:EngineArgs.create_engine_config"),
    reason="the executor must be set before ParallelConfig is created, which otherwise refuses two ranks on one device",
    feature="serving on a pair (--spark)",
    fingerprints={"47e28d3493ac": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    required=True,
)
