"""Repeats quantization scales while a model is loaded whose groups do not fit into a rank's part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_spark.models.regroup import repeated

    def get_all_weights(self: Any, model_config: Any, model: Any) -> Any:
        return repeated(original(self, model_config, model), model_config.hf_config)

    return get_all_weights


PATCH = Patch(
    name="repeated-scales",
    anchor=Anchor("vllm.model_executor.model_loader.default_loader:DefaultModelLoader.get_all_weights"),
    reason="weights go directly from the file to the model's own loader",
    feature="quantized models whose groups do not fit into halves",
    fingerprints={"a8d4ba2a2989": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    when="serving",
)
