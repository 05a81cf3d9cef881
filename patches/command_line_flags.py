"""Adds the option group `Spark` to every command that takes engine arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(*args: Any, **kwargs: Any) -> Any:
        from vllm_spark.entrypoints.command_line import add_option_group

        parser = original(*args, **kwargs)
        add_option_group(parser)
        return parser

    return add_cli_args


PATCH = Patch(
    name="command-line-flags",
    anchor=Anchor("vllm.engine.arg_utils:EngineArgs.add_cli_args"),
    reason="a platform plugin gets the parser of some commands only, and would be active without --spark too",
    feature="the flags --spark and --spark-*",
    fingerprints={"d884a77f60d9": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    required=True,
)
