"""Repeats quantization scales while a model with misaligned quantization groups is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_spark.models.regroup import repeat_scales

    def get_all_weights(self: Any, model_config: Any, model: Any) -> Any:
        return repeat_scales(original(self, model_config, model), model_config.hf_config)

    return get_all_weights


PATCH = Patch(
    name="repeated-scales",
    anchor=Anchor("vllm.model_executor.model_loader.default_loader:DefaultModelLoader.get_all_weights"),
    reason="vLLM has no hook between reading weights and the model's own loader",
    feature="quantized models whose groups are not aligned to two ranks",
    fingerprints={"a8d4ba2a2989": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    when="serving",
)
