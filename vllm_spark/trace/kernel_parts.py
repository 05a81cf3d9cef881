"""The part of a step to which a GPU's kernel belongs, by its name.

The names of parts are those of `vllm-spark estimate`. Where a kernel's name does not say which layer called it, as with
dense matrices, one part has them all.
"""

from __future__ import annotations

import re

from vllm_spark.estimate.step import ATTENTION, COLLECTIVES, EXPERTS, NORMS, ROUTER, STATES
from vllm_spark.recording.parts import SAMPLE

MATRICES = "matrices"
"""Dense matrices: projections, MLP and output head."""
COPIES = "copies"

KERNEL_PARTS = (EXPERTS, MATRICES, ATTENTION, STATES, ROUTER, NORMS, SAMPLE, COPIES, COLLECTIVES)
"""In the order of reports."""

_RULES = (
    (COLLECTIVES, r"^all_reduce_|^all_gather_|nccl"),
    (COPIES, r"^mem(cpy|set)|copy_kernel|copy_device|direct_copy"),
    (ROUTER, r"topk|moe_align|count_and_sort|grouped_topk|routing"),
    (EXPERTS, r"moe"),
    (STATES, r"mamba|conv1d|gated_delta|chunk_scan|selective_scan"),
    (ATTENTION, r"attention|flash|fmha|attn|reshape_and_cache|rotary|mla|merge_states"),
    (MATRICES, r"marlin|gemm|gemv|nvjet|cutlass|cublas|splitk|matmul"),
    (SAMPLE, r"argmax|sampl|softmax|multinomial|gather_logprobs"),
)
"""The first that is found counts: Marlin's kernel for experts has both names."""


def part_of(kernel: str) -> str:
    """The part of a kernel's name, mangled or not; NORMS for what no rule knows."""
    name = kernel.lower()
    return next((part for part, pattern in _RULES if re.search(pattern, name)), NORMS)
