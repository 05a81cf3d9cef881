"""Which loaded layers may use a table of Marlin's kernel for experts."""

from __future__ import annotations

from typing import Any

from vllm_spark.kernels.marlin.table import MarlinShape

_SCALES = {"moe_w13": "w1_scale", "moe_w2": "w2_scale"}
"""vLLM's names of the scales of each kernel's weights: for each expert, groups times output width."""


def may_use(experts: Any, shape: MarlinShape) -> bool:
    """Whether calls for these experts may have this shape, as far as the layer shows it.

    True if the layer does not show it: a call decides by all of its arguments.

    Args:
        experts: vLLM's object that runs a layer's experts on Marlin, with its weights loaded.
        shape: that a table is for.
    """
    scales = getattr(experts, _SCALES.get(shape.kernel, ""), None)
    size = getattr(scales, "shape", None)
    if size is None or len(size) != 3:
        return True
    groups = 1 if shape.group_size in (-1, shape.size_k) else shape.size_k // shape.group_size
    return tuple(size) == (shape.experts, groups, shape.size_n)
