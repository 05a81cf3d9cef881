"""The tables that belong to a layer, by the shapes of its kernels after vLLM's padding."""

from __future__ import annotations

import math

from vllm_spark.kernels.fused_moe.table import FusedMoeShape
from vllm_spark.kernels.marlin.table import MarlinShape
from vllm_spark.models.layers import Dense, Experts, Layer
from vllm_spark.models.weights import Bf16, Fp8Block, Fp8Channel, Int4, Int8, Mxfp4, Weights


def marlin_shapes(layer: Layer) -> list[MarlinShape]:
    """The GEMMs of `layer` that run on Marlin on a GB10: two for experts, one for a linear layer; may be empty."""
    kind = _marlin_type(layer.weights)
    if kind is None:
        return []
    quant, group = kind
    if isinstance(layer, Dense):
        if isinstance(layer.weights, Mxfp4):  # vLLM keeps linear layers of such models in bfloat16
            return []
        size_n, size_k = padded_dense(layer.size_n, layer.size_k, group)
        return [
            MarlinShape(
                kernel="dense", experts=1, top_k=1, size_n=size_n, size_k=size_k, group_size=group, quant_type=quant
            )
        ]
    hidden, inner = padded_experts(layer)
    return [
        MarlinShape(
            kernel="moe_w13",
            experts=layer.experts,
            top_k=layer.top_k,
            size_n=2 * inner,
            size_k=hidden,
            group_size=group,
            quant_type=quant,
        ),
        MarlinShape(
            kernel="moe_w2",
            experts=layer.experts,
            top_k=layer.top_k,
            size_n=hidden,
            size_k=inner,
            group_size=group,
            quant_type=quant,
        ),
    ]


def fused_moe_shape(layer: Experts) -> FusedMoeShape | None:
    """The table that vLLM's Triton kernel reads for these experts; None if their format has none."""
    weights = layer.weights
    if isinstance(weights, Bf16):
        return FusedMoeShape(layer.experts, layer.intermediate)
    if isinstance(weights, Fp8Channel):
        return FusedMoeShape(layer.experts, layer.intermediate, "fp8_w8a8")
    if isinstance(weights, Fp8Block):
        return FusedMoeShape(layer.experts, layer.intermediate, "fp8_w8a8", weights.block)
    if isinstance(weights, Int4):
        return FusedMoeShape(layer.experts, layer.intermediate, "int4_w4a16")
    if isinstance(weights, Int8):
        # For int8, the packed width is the width.
        return FusedMoeShape(layer.experts, layer.intermediate, "int8_w8a16")
    return None


def padded_experts(layer: Experts) -> tuple[int, int]:
    """Widths of the model and of an expert after vLLM's padding to a multiple of a tile.

    vLLM refuses misaligned quantization groups (1408 in groups of 128, on two ranks); `regroup.layers_as_served`
    has made them smaller before.
    """
    if isinstance(layer.weights, Mxfp4):
        return _round_up(layer.hidden, 256), _round_up(layer.intermediate, 128)
    kind = _marlin_type(layer.weights)
    group = kind[1] if kind is not None else -1
    return layer.hidden, _round_up(layer.intermediate, math.lcm(64, max(group, 1)))


def padded_dense(size_n: int, size_k: int, group_size: int) -> tuple[int, int]:
    """N and K of a linear layer after vLLM's padding to multiples of a tile, by the cheaper of two ways."""
    group = max(group_size, 1)
    wide = _round_up(size_n, 64), _round_up(size_k, math.lcm(128, group))
    narrow = _round_up(size_n, 128), _round_up(size_k, math.lcm(64, group))
    return min(wide, narrow, key=lambda pair: (pair[0] * pair[1], pair[0] + pair[1]))


def _marlin_type(weights: Weights) -> tuple[str, int] | None:
    if isinstance(weights, Int4):
        return ("uint4" if weights.zero_points else "uint4b8"), weights.group_size
    if isinstance(weights, Int8):
        return "uint8b128", weights.group_size
    if isinstance(weights, Mxfp4):
        return "float4_e2m1f", 32
    return None


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
