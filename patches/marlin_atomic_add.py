"""Lets a table choose which of Marlin's linear layers use atomic adds for partial sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_spark.kernels import runtime

    def should_use_atomic_add_reduce(m: int, n: int, k: int, device: Any, dtype: Any) -> bool:
        # torch.compile traces this, with a symbolic m.
        if runtime.uses_atomic_add(n, k):
            return True
        return bool(original(m, n, k, device, dtype))

    return should_use_atomic_add_reduce


PATCH = Patch(
    name="marlin-atomic-add",
    anchor=Anchor("vllm.model_executor.layers.quantization.utils.marlin_utils:should_use_atomic_add_reduce"),
    reason="one environment variable decides for all layers",
    feature="tuned parameters of Marlin for linear layers",
    fingerprints={"bd5b0a0e3649": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    when="tuning",
)
