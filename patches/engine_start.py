"""Ends the pair of an engine whose start fails after its model is up, in the process that starts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_spark.executor.executor import abandon_engine

        try:
            original(self, *args, **kwargs)
        except BaseException as error:
            abandon_engine(self, error)
            raise

    return __init__


PATCH = Patch(
    name="engine-start",
    anchor=Anchor("vllm.v1.engine.core:EngineCore.__init__"),
    reason="vLLM does not shut down the executor of an engine whose start fails, and makes no call of it any more",
    feature="a second engine in the same process after one whose scheduler could not be made",
    fingerprints={"63fe09e553de": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    when="engine",
)
