"""Which rows of a FusedMoE table are tried."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_spark.compat.patching import installed_source
from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.fused_moe.check import check_fused_moe_table, shared_bytes
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, FusedMoeParameters
from vllm_spark.tune.fused_moe.search import search_space, without_slow
from vllm_spark.tune.tables import new_tables, store_tables

from .tuning_outcomes import (
    BF16,
    FP8_BLOCK,
    FP8_CHANNEL,
    INT4,
    VERSIONS,
    experts,
    fused,
)


@given(shape=experts(), rows=st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_the_space_has_only_what_can_run(shape: FusedMoeExperts, rows: int) -> None:
    space = search_space(shape, rows, GB10)
    assert len(set(space)) == len(space) < 120
    for row in space:
        assert (row.GROUP_SIZE_M, row.SPLIT_K) == (1, 1)
        assert row.BLOCK_SIZE_M == 16
        if shape.dtype is None:
            assert (row.num_stages - 1) * (16 + row.BLOCK_SIZE_N) * row.BLOCK_SIZE_K * 2 <= GB10.shared_bytes
        if shape.block_shape is not None:
            assert row.BLOCK_SIZE_K <= 128, "the kernel cuts it to the block"
        if shape.is_int4:
            assert row.BLOCK_SIZE_K // shape.group_size in (1, 2, 4, 8)
            assert shape.hidden % row.BLOCK_SIZE_K == shape.intermediate % row.BLOCK_SIZE_K == 0
        assert max(shape.hidden, 2 * shape.intermediate) >= row.BLOCK_SIZE_N


@given(shape=experts())
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_space_passes_the_check(tmp_path: Path, shape: FusedMoeExperts) -> None:
    space = search_space(shape, 1, GB10)
    outcomes = [fused(rows, shape=shape, parameters=space[rows * len(space) // 9]) for rows in range(1, 9) if space]
    for table in new_tables(outcomes, {}, GB10, VERSIONS):
        (path,) = store_tables([table], tmp_path)
        found = list(check_fused_moe_table(path, None, None))
        assert [each for each in found if each.kind == "error"] == []


@pytest.mark.parametrize("shape", [BF16, FP8_BLOCK, FP8_CHANNEL])
def test_the_space_leaves_out_no_row_that_fits(shape: FusedMoeExperts) -> None:
    space = set(search_space(shape, 1, GB10))
    for size_n, size_k, warps, stages in itertools.product((32, 64, 128, 256), (64, 128), (4, 8), (2, 3, 4, 5)):
        row = FusedMoeParameters(
            BLOCK_SIZE_M=16, BLOCK_SIZE_N=size_n, BLOCK_SIZE_K=size_k, num_warps=warps, num_stages=stages
        )
        needed = shared_bytes(shape.table, row.row())
        assert needed is not None
        assert (row in space) == (needed <= GB10.shared_bytes)


def test_blocks_of_32_rows_are_tried_where_an_expert_may_have_them() -> None:
    assert {row.BLOCK_SIZE_M for row in search_space(BF16, 16, GB10)} == {16}
    assert {row.BLOCK_SIZE_M for row in search_space(BF16, 17, GB10)} == {16, 32}


def test_int4_rows_are_those_of_tritons_kernel() -> None:
    """Also in steps of few tokens: vLLM's class that serves runs no other."""
    space = search_space(INT4, 8, GB10)
    assert {row.num_warps for row in space} == {4, 8}
    assert {row.num_stages for row in space} == {2, 3, 4, 5}


def test_vllms_class_for_int4_experts_runs_tritons_kernel_alone() -> None:
    """What the search, and which published rows are left out, rely on; `fused_experts` chooses between two kernels."""
    experts = installed_source("vllm.model_executor.layers.fused_moe.experts.triton_moe")
    functions = installed_source("vllm.model_executor.layers.fused_moe.fused_moe")
    assert experts is not None
    assert functions is not None
    serving = experts.partition("class TritonWNA16Experts")[2]
    assert serving.count("invoke_fused_moe_wna16_triton_kernel(") == 2, "gate and up, and down"
    for name in ("invoke_fused_moe_wna16_cuda_kernel(", "dispatch_fused_moe_kernel("):
        assert name in functions
        assert name not in serving


def test_what_was_far_off_elsewhere_is_not_tried_again() -> None:
    fast, near, far, new = search_space(BF16, 1, GB10)[:4]
    known = [fused(tried=[(fast, 0.8), (near, 1.1), (far, 1.3)])]
    assert without_slow([fast, near, far, new], known) == [fast, near, new]
    assert without_slow([fast, near, far, new], []) == [fast, near, far, new]
