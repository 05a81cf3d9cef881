"""A model that is tuned, and the shapes of its kernels that have tunable parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_spark.errors import ConfigurationError
from vllm_spark.kernels.fused_moe.shapes import Format, FusedMoeExperts
from vllm_spark.kernels.marlin.rules import Gemm, shape_fault
from vllm_spark.kernels.marlin.table import MarlinShape
from vllm_spark.models.layers import Experts, Layer
from vllm_spark.models.regroup import GROUP_SIZES
from vllm_spark.models.weights import Bf16, Fp8Block, Fp8Channel, Int4
from vllm_spark.tune import table_shapes
from vllm_spark.tune.results import Shape

Kernels = Literal["auto", "marlin", "triton"]
"""Kernels to tune. `auto`: Marlin for int4 and Triton for all other formats, as vLLM runs them on a GB10."""


@dataclass(frozen=True)
class TunedModel:
    """A model at one tensor parallel size.

    Attributes:
        name: for people.
        tp: tensor parallel size; shapes are those of one rank.
        layers: as `regroup.layers_as_served` gives them.
    """

    name: str
    tp: int
    layers: Sequence[Layer]

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"{self.name} TP={self.tp}"


def shapes_of(model: TunedModel, kernels: Kernels) -> list[Shape]:
    """All shapes that are tuned for a model.

    Raises:
        ConfigurationError: no kernel supports a shape.
    """
    shapes: list[Shape] = []
    if kernels != "triton":
        shapes += marlin_shapes(model)
    if kernels != "marlin":
        shapes += fused_moe_shapes(model, int4=kernels == "triton")
    return shapes


def marlin_shapes(model: TunedModel) -> list[MarlinShape]:
    """GEMMs of its experts with 4-bit weights, as Marlin's kernel sees them (after vLLM's padding).

    Raises:
        ConfigurationError: no kernel supports a shape.
    """
    shapes: dict[MarlinShape, None] = {}
    for layer in model.layers:
        if not isinstance(layer, Experts) or not layer.gated or not isinstance(layer.weights, Int4):
            continue
        for shape in table_shapes.marlin_shapes(layer):
            gemm = Gemm(True, shape.size_n, shape.size_k, shape.group_size, shape.quant_type)
            if fault := shape_fault(gemm):
                raise ConfigurationError(f"{layer.name} of {model.label} cannot be tuned: {fault}")
            shapes[shape] = None
    return list(shapes)


def fused_moe_shapes(model: TunedModel, int4: bool = False) -> list[FusedMoeExperts]:
    """Experts of the model that vLLM's Triton kernel can run.

    Args:
        model: with layers as they are served.
        int4: include int4 experts, which run on Marlin by default.

    Raises:
        ConfigurationError: the kernel does not support a shape.
    """
    shapes: dict[FusedMoeExperts, None] = {}
    for layer in model.layers:
        if not isinstance(layer, Experts) or not layer.gated:
            continue
        table = table_shapes.fused_moe_shape(layer)
        dtype = _FORMATS.get(type(layer.weights))
        if table is None or type(layer.weights) not in _FORMATS or (dtype == "int4_w4a16" and not int4):
            continue
        if fault := _triton_fault(layer):
            raise ConfigurationError(f"{layer.name} of {model.label} cannot be tuned for Triton: {fault}")
        group_size, zero_points = 0, False
        if isinstance(layer.weights, Int4):
            group_size, zero_points = layer.weights.group_size, layer.weights.zero_points
        shape = FusedMoeExperts(
            experts=layer.experts,
            top_k=layer.top_k,
            hidden=layer.hidden,
            intermediate=layer.intermediate,
            dtype=dtype,
            block_shape=table.block_shape,
            group_size=group_size,
            zero_points=zero_points,
        )
        shapes[shape] = None
    return list(shapes)


_FORMATS: Mapping[type, Format | None] = {
    Bf16: None,
    Fp8Block: "fp8_w8a8",
    Fp8Channel: "fp8_w8a8",
    Int4: "int4_w4a16",
}


def _triton_fault(layer: Experts) -> str | None:
    widths = (layer.hidden, layer.intermediate)
    if isinstance(layer.weights, Int4):
        group = layer.weights.group_size
        if group not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            return f"its int4 kernel supports groups of {sizes}, and the group size is {group if group > 0 else 'none'}"
        if any(width % group for width in widths):
            return f"a rank's widths {widths[0]} and {widths[1]} are not multiples of the group size {group}"
    if isinstance(layer.weights, Fp8Block) and any(width % max(layer.weights.block) for width in widths):
        block = " x ".join(map(str, layer.weights.block))
        return (
            f"a rank's widths {widths[0]} and {widths[1]} are not multiples of the block size {block}, which vLLM "
            "requires"
        )
    return None
