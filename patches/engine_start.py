"""Ends the session of an engine whose start fails after its model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_spark.executor.leader_executor import abandon_engine

        try:
            original(self, *args, **kwargs)
        except BaseException as error:
            abandon_engine(self, error)
            raise

    return __init__


PATCH = Patch(
    name="engine-start",
    anchor=Anchor("vllm.v1.engine.core:EngineCore.__init__"),
    reason="vLLM neither shuts down nor calls the executor of an engine whose start fails",
    feature="a second engine in the same process after a failed start",
    fingerprints={"63fe09e553de": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    when="engine",
)
