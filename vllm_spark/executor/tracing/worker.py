"""What is timed within vLLM's worker, beside the scopes that its model runner has for profilers."""

from __future__ import annotations

from typing import Any

from vllm_spark.recording import parts

_SECOND_RUNNER = "vllm.v1.worker.gpu."
"""The package of vLLM's second model runner (`VLLM_USE_V2_MODEL_RUNNER`), which has no such scopes."""


def worker_functions(worker: Any) -> list[tuple[Any, str, str]]:
    """Functions of a worker's model runner that are parts of a step: owner, attribute, part. None with scopes."""
    runner = getattr(getattr(worker, "worker", worker), "model_runner", None)
    if runner is None or not type(runner).__module__.startswith(_SECOND_RUNNER):
        return []
    return [
        (runner, "prepare_inputs", parts.PREPARE),
        (runner, "prepare_attn", parts.PREPARE),
        (runner, "execute_model", parts.FORWARD),
        (getattr(runner, "model", None), "compute_logits", parts.HEAD),
        (runner, "sample", parts.SAMPLE),
        (runner, "sample_tokens", parts.OUTPUT),
    ]
