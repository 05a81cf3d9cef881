"""Compares the adapter of a request of `LLM` on both machines before the request is added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    import inspect

    parameters = inspect.signature(original)

    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_spark.entrypoints.client_adapters import compare_adapter

        compare_adapter(self, parameters.bind(self, *args, **kwargs).arguments.get("lora_request"))
        return original(self, *args, **kwargs)

    return add_request


PATCH = Patch(
    name="request-adapter",
    anchor=Anchor("vllm.v1.engine.llm_engine:LLMEngine.add_request"),
    reason="an executor gets the adapter of a request with a step, and cannot refuse a single request there",
    feature="an error of only that request for an adapter that is not the same on both machines",
    fingerprints={
        "a8097f7c18a0": "0.26.0, 0.27.0",
        "aa9bb37200bd": "0.28.0, 0.29.0, 0.30.0",
        "c262bd9b57c1": "0.31.0, 0.32.0, 0.33.0",
    },
    replace=_replace,
    when="engine",
)
