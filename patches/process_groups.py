"""Makes vLLM's groups of ranks use the groups connection during a session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_spark.backend.process_group import instead_of_gloo, pair_is_up

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not pair_is_up():
            original(self, *args, **kwargs)
            return
        with instead_of_gloo():
            # The message queue would listen on another port; without it, objects are broadcast through the group.
            original(self, *args, **{**kwargs, "use_message_queue_broadcaster": False})

    return __init__


PATCH = Patch(
    name="process-groups",
    anchor=Anchor("vllm.distributed.parallel_state:GroupCoordinator.__init__"),
    reason="it requests gloo by name, whatever the platform's backend, and opens a port for its broadcaster",
    feature="process groups over the pair's own port (--spark)",
    fingerprints={
        "4be6156dd280": "0.26.0",
        "8e7734224096": "0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0",
    },
    replace=_replace,
    when="serving",
    required=True,
)
