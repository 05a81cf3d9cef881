"""The names of what a rank does in a step.

Parts of the host's thread. Kernels of a GPU have the names of `vllm_spark.estimate.step`, as have these where they mean
the same (`vllm_spark/trace/kernel_parts.py`).
"""

from __future__ import annotations

REQUESTS = "requests"
"""The leader's engine takes requests and calls of its clients."""
SCHEDULE = "schedule"
"""vLLM's scheduler chooses what the step computes."""
SEND = "send the step"
"""The leader encodes the step and writes it to the follower."""
WAIT_STEP = "wait for the step"
"""The follower has nothing to do until the leader's call arrives."""
READ = "read the step"
"""The follower decodes the call."""
PREPARE = "prepare inputs"
"""vLLM's worker makes the step's tensors."""
FORWARD = "model forward"
"""The model's layers; on a GPU their launch."""
COLLECTIVES = "collectives"
"""Collectives on CPU tensors but for their waits; on a GPU their kernels."""
WAIT_PEER = "wait for the peer"
"""Within a collective: the other rank's message has not arrived."""
HEAD = "output head"
"""The logits, with their gather."""
SAMPLE = "sampling"
DRAFT = "draft"
OUTPUT = "output"
"""vLLM's worker makes lists of the tokens."""
WAIT_DEVICE = "wait for the GPU"
"""The leader's engine waits for a step's tokens, which it needs next."""
UPDATE = "update requests"
"""vLLM's scheduler takes the tokens; the engine makes the clients' outputs."""
WORKER = "worker, other"
"""The worker's call but for the parts above."""
LOOP = "engine loop"
"""The loop around steps but for the parts above."""

HOST_PARTS = (
    *(REQUESTS, SCHEDULE, SEND, WAIT_STEP, READ, PREPARE, FORWARD, COLLECTIVES, WAIT_PEER, HEAD, SAMPLE, DRAFT),
    *(OUTPUT, WAIT_DEVICE, UPDATE, WORKER, LOOP),
)
"""In the order of a step."""

WAITS = frozenset({WAIT_STEP, WAIT_PEER, WAIT_DEVICE})
"""Parts in which a rank waits for something else."""

SCOPES = {
    "gpu_model_runner: preprocess": PREPARE,
    "gpu_model_runner: forward": FORWARD,
    "gpu_model_runner: postprocess": HEAD,
    "gpu_model_runner: sample": SAMPLE,
    "gpu_model_runner: draft": DRAFT,
}
"""The parts of the scopes that vLLM's model runner has for profilers; its other ones are OUTPUT."""
SCOPE_PREFIX = "gpu_model_runner: "
