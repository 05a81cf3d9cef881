"""Copies the values of `--spark*` from the command line into vLLM's engine arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli_args(cls: type, *args: Any, **kwargs: Any) -> Any:
        from vllm_spark.entrypoints.command_line import create_engine_arguments

        parsed = args[0] if args else kwargs.get("args")
        return create_engine_arguments(parsed, lambda: original(cls, *args, **kwargs))

    return from_cli_args


PATCH = Patch(
    name="flags-to-settings",
    anchor=Anchor("vllm.engine.arg_utils:EngineArgs.from_cli_args"),
    reason="it ignores options that are not fields of EngineArgs",
    feature="the flags --spark and --spark-*",
    fingerprints={"ab5a6b5608d1": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    required=True,
)
