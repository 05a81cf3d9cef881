"""A test problem: a block of experts with random weights on this GPU, for vLLM's Triton kernel with any row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, FusedMoeParameters, vllm_row
from vllm_spark.tune.timing import route


@dataclass(frozen=True)
class ExpertsWeights:
    """Random weights of one layer: gate and up, down; their scales; and zero points of int4, if it has them."""

    w13: torch.Tensor
    w2: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None
    zero_points: tuple[torch.Tensor, torch.Tensor] | None


class FusedMoeProblem:
    """`calls` calls of a layer's experts for `rows` tokens, each with its own routing, over several layers.

    Args:
        shape: sizes and format.
        layers: enough sets of weights that each is evicted from caches before it is used again.
        rows: tokens of the decode step.
        calls: in one run; call i uses the weights of layer i modulo `layers`.
        seed: of routings and inputs.
        device: as in `devices.device_file_name`, for vLLM's own choice.
    """

    def __init__(
        self, shape: FusedMoeExperts, layers: list[ExpertsWeights], rows: int, calls: int, seed: int, device: str
    ):
        self._shape, self._layers = shape, layers
        self._own = vllm_row(shape, device, rows)
        generator = torch.Generator(device="cuda").manual_seed(seed)
        self._input = torch.randn(rows, shape.hidden, device="cuda", dtype=torch.bfloat16, generator=generator)
        self._routes = [
            tuple(tensor.cuda() for tensor in route(rows, shape.experts, shape.top_k, seed * 1000 + call))
            for call in range(calls)
        ]
        self._experts: Callable[..., torch.Tensor] = _packed_experts if shape.is_int4 else _experts

    def run(self, parameters: FusedMoeParameters | None) -> None:
        """Enqueues all calls on the current stream."""
        for call in range(len(self._routes)):
            self.call(call, parameters)

    def call(self, call: int, parameters: FusedMoeParameters | None) -> torch.Tensor:
        """Enqueues one call; returns [rows, hidden] bfloat16.

        Args:
            call: its index.
            parameters: of both GEMMs; None for vLLM's own choice, without the user's tables.
        """
        row = self._own if parameters is None else parameters.row()
        layer = self._layers[call % len(self._layers)]
        return self._experts(self._shape, row, self._input, layer, *self._routes[call])


def layer_bytes(shape: FusedMoeExperts) -> int:
    """Bytes of one layer's weights, without the scales, which are small."""
    return shape.experts * expert_bytes(shape)


def expert_bytes(shape: FusedMoeExperts) -> int:
    """Bytes of one expert's weights, without scales."""
    bits = {None: 16, "fp8_w8a8": 8, "int4_w4a16": 4}[shape.dtype]
    return 3 * shape.hidden * shape.intermediate * bits // 8


def random_weights(shape: FusedMoeExperts, seed: int) -> ExpertsWeights:
    """Random weights in the layouts of vLLM's kernel, scaled so that outputs neither vanish nor overflow."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    sizes = ((shape.experts, 2 * shape.intermediate, shape.hidden), (shape.experts, shape.hidden, shape.intermediate))

    def scales(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (torch.rand(*size, device="cuda", generator=generator) * 0.02 + 0.01).to(dtype)

    def octets(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, device="cuda", generator=generator)

    if shape.dtype is None:
        w13, w2 = (torch.empty(size, device="cuda", dtype=torch.bfloat16) for size in sizes)
        return ExpertsWeights(
            w13.normal_(std=0.03, generator=generator), w2.normal_(std=0.03, generator=generator), None, None
        )
    if shape.is_int4:
        groups = [(experts, columns, inputs // shape.group_size) for experts, columns, inputs in sizes]
        w13, w2 = (octets(experts, columns, inputs // 2) for experts, columns, inputs in sizes)
        small, large = (scales(*size, dtype=torch.bfloat16) * 0.2 for size in groups)
        points = None
        if shape.zero_points:
            first, second = (octets(experts, columns // 2, count) for experts, columns, count in groups)
            points = (first, second)
        return ExpertsWeights(w13, w2, (small, large), points)
    # The highest bit of the exponent stays 0: all numbers are below 2, and none is NaN.
    w13, w2 = (octets(*size).bitwise_and_(0xBF).view(torch.float8_e4m3fn) for size in sizes)
    if shape.block_shape is None:
        of = [(experts, columns, 1) for experts, columns, _ in sizes]
    else:
        block_n, block_k = shape.block_shape
        of = [(experts, -(-columns // block_n), -(-inputs // block_k)) for experts, columns, inputs in sizes]
    first, second = (scales(*size) for size in of)
    return ExpertsWeights(w13, w2, (first, second), None)


def _experts(
    shape: FusedMoeExperts,
    row: dict[str, int],
    inputs: torch.Tensor,
    layer: ExpertsWeights,
    weights: torch.Tensor,
    chosen: torch.Tensor,
) -> torch.Tensor:
    """Calls vLLM's own function, for weights in bfloat16 or fp8."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    described: Any = None
    if layer.scales is not None:
        channels = shape.block_shape is None
        described = FusedMoEQuantConfig.make(
            torch.float8_e4m3fn,
            per_act_token_quant=channels,
            per_out_ch_quant=channels,
            block_shape=None if shape.block_shape is None else list(shape.block_shape),
            w1_scale=layer.scales[0],
            w2_scale=layer.scales[1],
        )
    with _overriding(row):
        return fused_experts(inputs, layer.w13, layer.w2, weights, chosen, quant_config=described)


def _packed_experts(
    shape: FusedMoeExperts,
    row: dict[str, int],
    inputs: torch.Tensor,
    layer: ExpertsWeights,
    weights: torch.Tensor,
    chosen: torch.Tensor,
) -> torch.Tensor:
    """Does the same as vLLM's class for int4 experts on Triton; its function would use a CUDA kernel for few tokens."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.fused_moe import invoke_fused_moe_wna16_triton_kernel
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    from vllm.triton_utils import tl

    assert layer.scales is not None
    scales, points = layer.scales, layer.zero_points or (None, None)
    tokens, top_k = chosen.shape
    first = inputs.new_empty(tokens, top_k, 2 * shape.intermediate)
    middle = inputs.new_empty(tokens * top_k, shape.intermediate)
    second = inputs.new_empty(tokens, top_k, shape.hidden)
    output = torch.empty_like(inputs)
    aligned = moe_align_block_size(chosen, row["BLOCK_SIZE_M"], shape.experts, None)

    def multiply(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, gemm: int) -> None:
        invoke_fused_moe_wna16_triton_kernel(
            a,
            b,
            c,
            scales[gemm],
            points[gemm],
            weights if gemm else None,
            *aligned,
            mul_routed_weight=bool(gemm),
            top_k=1 if gemm else top_k,
            config=row,
            compute_type=tl.bfloat16,
            use_int8_w8a16=False,
            use_int4_w4a16=True,
            block_shape=[0, shape.group_size],
        )

    multiply(inputs, layer.w13, first, 0)
    torch.ops._C.silu_and_mul(middle, first.view(-1, 2 * shape.intermediate))
    multiply(middle, layer.w2, second, 1)
    ops.moe_sum(second, output)
    return output


@contextmanager
def _overriding(row: dict[str, int]) -> Iterator[None]:
    """vLLM's `override_config`, which does not restore the config after an exception, with that corrected."""
    from vllm.model_executor.layers.fused_moe import override_config

    failure: BaseException | None = None
    with override_config(row):
        try:
            yield
        except BaseException as error:
            failure = error
    if failure is not None:
        raise failure
