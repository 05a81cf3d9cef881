"""Shapes, parameters and outcomes that the tests of the tuner share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from vllm_spark.files import configs_folder
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, FusedMoeParameters, default_row
from vllm_spark.kernels.fused_moe.table import FusedMoeShape, FusedMoeTable
from vllm_spark.kernels.marlin.table import MarlinParameters, MarlinShape
from vllm_spark.tune.results import (
    FusedMoeOutcome,
    MarlinOutcome,
)

VERSIONS = {"vllm": "0.32.0", "torch": "2.13.0", "triton": "3.8.0"}
W13 = MarlinShape(kernel="moe_w13", experts=128, top_k=8, size_n=768, size_k=2048, group_size=128, quant_type="uint4b8")
TILE = MarlinParameters(thread_k=64, thread_n=128, blocks_per_sm=2, block_size_m=8)
BF16 = FusedMoeExperts(experts=128, top_k=8, hidden=2048, intermediate=384)
FP8_BLOCK = BF16.model_copy(update={"dtype": "fp8_w8a8", "block_shape": (128, 128)})
FP8_CHANNEL = BF16.model_copy(update={"dtype": "fp8_w8a8"})
INT4 = BF16.model_copy(update={"dtype": "int4_w4a16", "group_size": 128})
ROW = FusedMoeParameters(BLOCK_SIZE_M=16, BLOCK_SIZE_N=32, BLOCK_SIZE_K=128, num_warps=4, num_stages=4)


def marlin(
    rows: int = 1, ratio: float = 0.9, parameters: MarlinParameters = TILE, shape: MarlinShape = W13
) -> MarlinOutcome:
    return MarlinOutcome(
        shape=shape,
        rows=rows,
        parameters=parameters,
        default_us=10.0,
        tuned_us=10 * ratio,
        ratio=ratio,
        tried=[(TILE, ratio)],
    )


def fused(
    rows: int = 1,
    ratio: float = 0.9,
    parameters: FusedMoeParameters | None = ROW,
    shape: FusedMoeExperts = BF16,
    tried: Sequence[tuple[FusedMoeParameters, float]] = ((ROW, 0.9),),
) -> FusedMoeOutcome:
    return FusedMoeOutcome(
        shape=shape,
        rows=rows,
        parameters=parameters,
        default_us=20.0,
        tuned_us=20 * ratio,
        ratio=ratio,
        tried=list(tried),
    )


FORMATS = st.sampled_from([BF16, FP8_BLOCK, FP8_CHANNEL, INT4, INT4.model_copy(update={"group_size": 32})])
SIZES = {
    "experts": st.sampled_from([8, 60, 128, 256, 512]),
    "top_k": st.integers(1, 8),
    "hidden": st.sampled_from([2048, 3072, 4096]),
    "intermediate": st.sampled_from([128, 256, 384, 704, 768, 1024, 1536]),
}


@st.composite
def experts(draw: st.DrawFn) -> FusedMoeExperts:
    shape = draw(FORMATS).model_copy(update={name: draw(values) for name, values in SIZES.items()})
    if shape.intermediate == 704 and (shape.group_size or shape.block_shape):
        shape = shape.model_copy(update={"intermediate": 640})  # whole groups and blocks
    return shape


def shipped(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((configs_folder() / "models" / name / "config.json").read_text())
    return config


def default_table(shape: FusedMoeShape) -> FusedMoeTable:
    """A table that gives every step vLLM's default: vLLM takes the nearest row, so one is on both sides of a change."""
    last = [4, 8, 16, 64] if shape.block_shape is not None else [32, 64, 96, 128, 512, 129 * shape.experts - 1]
    changes = (tokens for end in last for tokens in (end, end + 1))
    keys = {*(2**power for power in range(14)), *changes}
    return FusedMoeTable({key: default_row(shape, key) for key in sorted(keys)})
