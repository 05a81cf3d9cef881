"""Leader, follower, and the channel between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_spark.executor.leader_executor import SparkExecutor

__all__ = ["SparkExecutor"]


def __getattr__(name: str) -> Any:
    # Lazily: the executor needs vLLM, and a waiting follower should not load it for a look at this package.
    if name == "SparkExecutor":
        from vllm_spark.executor.leader_executor import SparkExecutor

        return SparkExecutor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
