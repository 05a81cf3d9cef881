"""Reads tuned tables for vLLM's Triton kernel for experts from the user's folder and from this project's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    import functools

    from vllm_spark.kernels import runtime

    cached: Any = original  # by functools.lru_cache
    uncached: Callable[..., dict[int, Any] | None] = cached.__wrapped__

    # vLLM's names of parameters: callers may pass them by name.
    def get_moe_configs(
        E: int,
        N: int,
        dtype: str | None,
        block_n: int | None = None,
        block_k: int | None = None,
    ) -> dict[int, Any] | None:
        def vllm_lookup() -> dict[int, Any] | None:
            return uncached(E, N, dtype, block_n, block_k)

        if not runtime.is_active():
            return vllm_lookup()
        return runtime.choose_fused_moe_table(E, N, dtype, block_n, block_k, vllm_lookup)

    maxsize: int | None = cached.cache_parameters()["maxsize"]
    return functools.lru_cache(maxsize=maxsize)(get_moe_configs)


PATCH = Patch(
    name="fused-moe-tables",
    anchor=Anchor("vllm.model_executor.layers.fused_moe.fused_moe:get_moe_configs", scope="source"),
    reason="vLLM reads tables only from one folder, named by a variable that belongs to the user, and from its own",
    feature="tuned tables of the Triton kernel for experts",
    fingerprints={
        "506bf40d8dc8": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0",
        "f3fed2eb4d4b": "0.31.0, 0.32.0, 0.33.0",
    },
    replace=_replace,
    when="tuning",
)
