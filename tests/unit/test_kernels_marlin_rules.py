"""Marlin's rules: what is known of GB10 comes out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.marlin.rules import (
    BLOCK_SIZES_M,
    Gemm,
    Tile,
    block_size_m,
    blocks_fault,
    shape_fault,
    shared_bytes,
)
from vllm_spark.tune.table_shapes import padded_dense

WIDE, DEEP, NARROW, LARGE = Tile(128, 128, 256), Tile(64, 128, 128), Tile(128, 64, 128), Tile(64, 256, 256)


def w13(rows: int) -> Gemm:
    """Gate and up of Qwen3-30B-A3B in int4 on one of two ranks."""
    return Gemm(True, 768, 2048, 128, "uint4b8", block_size_m(rows, 8, 128))


def w2(rows: int) -> Gemm:
    return Gemm(True, 2048, 384, 128, "uint4b8", block_size_m(rows, 8, 128))


def test_shared_memory_of_the_experts_tiles() -> None:
    assert [shared_bytes(tile, w13(1)) for tile in (WIDE, DEEP, NARROW)] == [50432, 25856, 33536]
    assert [shared_bytes(tile, w2(8)) for tile in (WIDE, DEEP, NARROW)] == [50432, 25856, 33536]


def test_shared_memory_grows_with_the_rows_of_an_expert() -> None:
    """The published emulation: for 64 of them."""
    gemm = dataclasses.replace(w13(1), block_size_m=64)
    assert [shared_bytes(tile, gemm) for tile in (NARROW, LARGE)] == [82432 + 1024, 68608 + 1024]


@pytest.mark.parametrize(
    ("rows", "block"), [(1, 8), (2, 8), (4, 8), (8, 8), (16, 8), (32, 8), (64, 8), (128, 16), (256, 32)]
)
def test_rows_of_an_expert_in_a_tile(rows: int, block: int) -> None:
    assert block_size_m(rows, 8, 128) == block


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_type": "int3"}, "'int3'"),
        ({"group_size": 100}, "groups of 100"),
        ({"quant_type": "float4_e2m1f"}, "groups of 128"),
        ({"size_k": 704}, "704"),
        ({"size_n": 96}, "N=96"),
        ({"block_size_m": 24}, "block_size_m is 24"),
    ],
)
def test_shapes_that_no_tile_takes(change: dict[str, Any], words: str) -> None:
    assert shape_fault(w13(1)) is None
    fault = shape_fault(dataclasses.replace(w13(1), **change))
    assert fault is not None
    assert words in fault


@pytest.mark.parametrize(
    ("tile", "blocks", "words"),
    [
        (Tile.requested(32, 128), 1, "less than 64"),
        (Tile.requested(256, 64), 1, "256x64"),
        (Tile.requested(64, 256), 1, "64x256"),
        (Tile.requested(128, 128), 2, "a block may have"),
        (Tile.requested(64, 128), 5, "blocks_per_sm is 5"),
        (Tile.requested(64, 128), 0, "blocks_per_sm is 0"),
        (Tile.requested(64, 128), 4, "a block may have"),
    ],
)
def test_tiles_that_the_kernel_refuses(tile: Tile, blocks: int, words: str) -> None:
    fault = blocks_fault(blocks, tile, w13(1), GB10)
    assert fault is not None
    assert words in fault


def test_tiles_that_the_kernel_takes() -> None:
    assert blocks_fault(1, WIDE, w13(1), GB10) is None
    assert blocks_fault(2, NARROW, w13(1), GB10) is None
    assert blocks_fault(3, DEEP, w13(1), GB10) is None


@given(rows=st.integers(1, 10_000), top_k=st.integers(1, 16), experts=st.integers(16, 512))
def test_the_block_size_grows_with_the_rows(rows: int, top_k: int, experts: int) -> None:
    here, more = block_size_m(rows, top_k, experts), block_size_m(rows + 1, top_k, experts)
    assert here in BLOCK_SIZES_M
    assert here <= more
    assert here == 64 or rows * top_k / experts < 0.9 * here


@given(size_n=st.integers(1, 4096), size_k=st.integers(1, 4096), group=st.sampled_from([-1, 32, 64, 128]))
def test_a_padded_layer_is_one_that_marlin_takes(size_n: int, size_k: int, group: int) -> None:
    padded_n, padded_k = padded_dense(size_n, size_k, group)
    assert size_n <= padded_n < size_n + 128
    assert size_k <= padded_k < size_k + 128
    assert shape_fault(Gemm(False, padded_n, padded_k, group, "uint4b8")) is None
    assert padded_dense(padded_n, padded_k, group) == (padded_n, padded_k)
