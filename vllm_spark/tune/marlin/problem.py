"""A test problem: one Marlin GEMM of experts with random weights on this GPU, for any parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_spark.compat.versions import accepted_arguments
from vllm_spark.kernels.marlin.rules import MAXIMUM_BLOCKS_PER_SM
from vllm_spark.kernels.marlin.table import MarlinParameters, MarlinShape
from vllm_spark.tune.results import BLOCK_SIZE_M
from vllm_spark.tune.timing import route


def expert_bytes(shape: MarlinShape) -> int:
    """Bytes of one expert's weights and scales (bfloat16)."""
    return shape.size_n * shape.size_k // 2 + shape.size_n * groups(shape) * 2


def groups(shape: MarlinShape) -> int:
    """Scales of one output column."""
    return 1 if shape.group_size == -1 else shape.size_k // shape.group_size


class MarlinProblem:
    """`calls` calls of a GEMM for `rows` tokens, each with its own routing, over several layers' weights.

    Args:
        shape: its sizes.
        layers: enough sets of weights that each is evicted from caches before it is used again.
        rows: tokens of the decode step.
        calls: in one run; call i uses the weights of layer i modulo `layers`.
        seed: of routings and inputs.
    """

    def __init__(self, shape: MarlinShape, layers: list[Weights], rows: int, calls: int, seed: int):
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

        self._shape, self._layers = shape, layers
        first = shape.kernel == "moe_w13"
        self._top_k = shape.top_k if first else 1
        self._size_m = rows if first else rows * shape.top_k
        generator = torch.Generator(device="cuda").manual_seed(seed)
        self._input = torch.randn(self._size_m, shape.size_k, device="cuda", dtype=torch.bfloat16, generator=generator)
        self.output = torch.zeros(rows * shape.top_k, shape.size_n, device="cuda", dtype=torch.bfloat16)
        self._workspace = torch.zeros(
            torch.cuda.get_device_properties(0).multi_processor_count * MAXIMUM_BLOCKS_PER_SM,
            dtype=torch.int,
            device="cuda",
        )
        self._routes = []
        for call in range(calls):
            weights, chosen = (tensor.cuda() for tensor in route(rows, shape.experts, shape.top_k, seed * 1000 + call))
            aligned = moe_align_block_size(chosen, BLOCK_SIZE_M, shape.experts, None)
            self._routes.append((weights, *aligned))

    def run(self, parameters: MarlinParameters) -> None:
        """Enqueues all calls on the current stream, each with the same output."""
        for call in range(len(self._routes)):
            self.call(call, parameters)

    def call(self, call: int, parameters: MarlinParameters) -> torch.Tensor:
        """Enqueues one call; returns `output`, [rows * top_k, size_n] bfloat16."""
        from vllm import _custom_ops as ops
        from vllm.scalar_type import scalar_types

        layer = self._layers[call % len(self._layers)]
        weights, sorted_ids, expert_ids, padded = self._routes[call]
        return ops.moe_wna16_marlin_gemm(
            self._input,
            self.output,
            layer.quantized,
            None,
            layer.scales,
            workspace=self._workspace,
            sorted_token_ids=sorted_ids,
            expert_ids=expert_ids,
            num_tokens_past_padded=padded,
            topk_weights=weights,
            moe_block_size=BLOCK_SIZE_M,
            top_k=self._top_k,
            mul_topk_weights=self._shape.kernel == "moe_w2",
            b_q_type=getattr(scalar_types, self._shape.quant_type),
            size_m=self._size_m,
            size_n=self._shape.size_n,
            size_k=self._shape.size_k,
            use_atomic_add=False,
            use_fp32_reduce=parameters.use_fp32_reduce,
            is_zp_float=False,
            thread_k=parameters.thread_k,
            thread_n=parameters.thread_n,
            blocks_per_sm=parameters.blocks_per_sm,
            b_qzeros=layer.zero_points,
            **_unused_arguments(),
        )


@dataclass(frozen=True)
class Weights:
    """Random weights of one layer's experts in Marlin's layout, their scales, and zero points of uint4."""

    quantized: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None


def random_weights(shape: MarlinShape, seed: int) -> Weights:
    """Random bits: weights [experts, size_k / 16, size_n * 2] int32, scales [experts, groups, size_n] bfloat16."""
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def bits(*size: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device="cuda", generator=generator)

    rows = (shape.experts, groups(shape))
    scales = torch.rand(*rows, shape.size_n, device="cuda", generator=generator)
    return Weights(
        bits(shape.experts, shape.size_k // 16, shape.size_n * 2),
        (scales * 0.01 + 0.001).bfloat16(),
        bits(*rows, shape.size_n // 8) if shape.quant_type == "uint4" else None,
    )


def _unused_arguments() -> dict[str, Any]:
    """Arguments without a default that are not used here; some exist only in some versions of vLLM."""
    from vllm import _custom_ops as ops

    empty = {"a_scales": None, "global_scale": None, "g_idx": None, "perm": None, "is_k_full": True}
    return accepted_arguments(ops.moe_wna16_marlin_gemm, empty)
