"""Returns status 400 instead of 500 for an adapter that is not the same on both machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    async def load_lora_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_spark.entrypoints.client_adapters import as_client_error

        return as_client_error(await original(self, *args, **kwargs))

    return load_lora_adapter


PATCH = Patch(
    name="adapter-status",
    anchor=Anchor("vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter"),
    reason="vLLM returns status 500 for every exception of its engine about an adapter",
    feature="status 400 for an adapter that is not the same on both machines",
    fingerprints={"224c64f528eb": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    when="leading",
)
