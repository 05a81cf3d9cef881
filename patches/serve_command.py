"""Runs `vllm serve --spark` as rank 1 under torchrun, and prints sentences instead of tracebacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    def cmd(*given: Any, **kwargs: Any) -> Any:
        from vllm_spark.entrypoints.command_line import run_serve

        args = given[0] if given else kwargs.get("args")
        return run_serve(args, lambda: original(*given, **kwargs))

    return cmd


PATCH = Patch(
    name="serve-command",
    anchor=Anchor("vllm.entrypoints.cli.serve:ServeSubcommand.cmd"),
    reason="a launcher starts the same command on both machines, so the command itself must become the follower",
    feature="vllm serve --spark under torchrun, and errors without a traceback",
    fingerprints={"eeb99fc7f8bd": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    required=True,
)
