"""Gives clients the reason why the session ended, instead of "see stack trace (above)"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_spark.backend.status import SERVER_STOPPED, engine_death, engine_ended_on_request

        original(self, *args, **kwargs)
        if death := engine_death():
            self.args = (f"{death}.",)
        elif engine_ended_on_request():
            self.args = (f"{SERVER_STOPPED}.",)

    return __init__


PATCH = Patch(
    name="client-error",
    anchor=Anchor("vllm.v1.engine.exceptions:EngineDeadError.__init__"),
    reason="only the engine's process has the reason, and the text for clients is constant",
    feature="the reason of a lost follower, or that the engine was killed or the server stopped, in answers to clients",
    fingerprints={"1c35b5aa0ca1": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    when="leading",
)
