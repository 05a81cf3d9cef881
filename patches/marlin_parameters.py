"""Calls Marlin's kernel for experts with the tile that a table gives for its shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_spark.kernels import runtime

    def moe_wna16_marlin_gemm(*args: Any, **kwargs: Any) -> Any:
        calls = runtime.marlin_calls(original) if runtime.is_active() else None
        # vLLM passes sizes by name, and no tile.
        if calls is None or "size_m" not in kwargs or "thread_k" in kwargs:
            return original(*args, **kwargs)
        chosen = calls.overrides(args, kwargs)
        return original(*args, **{**kwargs, **chosen}) if chosen else original(*args, **kwargs)

    return moe_wna16_marlin_gemm


PATCH = Patch(
    name="marlin-parameters",
    anchor=Anchor("vllm._custom_ops:moe_wna16_marlin_gemm"),
    reason="the operator accepts a tile, and its only caller never passes one",
    feature="tuned parameters of Marlin for experts",
    fingerprints={
        "aa5e45b41f10": "0.26.0, 0.27.0, 0.28.0, 0.29.0",
        "8a677e00bc64": "0.30.0, 0.31.0, 0.32.0, 0.33.0",
    },
    replace=_replace,
    when="tuning",
)
