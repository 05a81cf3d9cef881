"""Marlin's rules: what is known of GB10 comes out, and whatever the kernel would choose, it would also take."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_spark.tuning.gb10 import GB10
from vllm_spark.tuning.marlin_rules import (
    BLOCK_SIZES_M,
    MAXIMUM_BLOCKS_PER_SM,
    QUANTIZATIONS,
    Choice,
    Gemm,
    Tile,
    block_size_m,
    blocks_fault,
    choose,
    compiled_tiles,
    shape_fault,
    shared_bytes,
    tile_fault,
)
from vllm_spark.tuning.table_shapes import padded_dense

WIDE, DEEP, NARROW, LARGE = Tile(128, 128, 256), Tile(64, 128, 128), Tile(128, 64, 128), Tile(64, 256, 256)
# Of the experts' kernel for blocks of 8 rows in vLLM 0.33.0's aarch64 wheel, built for sm_120f.
REGISTERS = {WIDE: 118, DEEP: 94, NARROW: 118}
H100 = dataclasses.replace(GB10, name="NVIDIA_H100", multiprocessors=132, shared_bytes=232_448)


def w13(rows: int) -> Gemm:
    """Gate and up of Qwen3-30B-A3B in int4 on one of two ranks."""
    return Gemm(True, rows, 768, 2048, 128, "uint4b8", block_size_m(rows, 8, 128), top_k=8)


def w2(rows: int) -> Gemm:
    return Gemm(True, rows * 8, 2048, 384, 128, "uint4b8", block_size_m(rows, 8, 128))


def test_shared_memory_of_the_experts_tiles() -> None:
    assert [shared_bytes(tile, w13(1)) for tile in (WIDE, DEEP, NARROW)] == [50432, 25856, 33536]
    assert [shared_bytes(tile, w2(8)) for tile in (WIDE, DEEP, NARROW)] == [50432, 25856, 33536]


@pytest.mark.parametrize(("rows", "block"), [(1, 8), (2, 8), (4, 8), (8, 8), (16, 8), (32, 8), (64, 8)])
def test_gb10_takes_three_narrow_blocks_for_decode(rows: int, block: int) -> None:
    """The published emulation for sm_120f's registers."""
    assert w13(rows).block_size_m == block
    for gemm in (w13(rows), w2(rows)):
        assert choose(gemm, GB10, REGISTERS) == Choice(DEEP, 3, 1)


@given(registers=st.integers(32, 168))
def test_gb10_takes_as_many_for_more_tokens(registers: int) -> None:
    """Registers of those kernels are not known; up to 168 of a thread they do not decide."""
    assert w13(128).block_size_m == 16
    assert w13(256).block_size_m == 32
    for gemm in (w13, w2):
        assert choose(gemm(128), GB10, lambda tile: registers if tile == DEEP else 255) == Choice(DEEP, 3, 1)
        assert choose(gemm(256), GB10, lambda tile: registers if tile == DEEP else 255) == Choice(DEEP, 2, 2)


def test_a_larger_gpu_has_too_few_columns_for_one_token() -> None:
    assert choose(w13(1), H100, REGISTERS) == Choice(NARROW, 2, 1)
    assert choose(w2(1), H100, REGISTERS) == Choice(NARROW, 4, 1)
    assert choose(w13(8), H100, REGISTERS) == choose(w2(8), H100, REGISTERS) == Choice(DEEP, 4, 1)


@pytest.mark.parametrize(
    ("size_n", "size_k", "one", "many"),
    [
        (2560, 2048, WIDE, NARROW),
        (2048, 2048, WIDE, NARROW),
        (5120, 2048, WIDE, LARGE),
        (2048, 4096, WIDE, NARROW),
        (25600, 5120, WIDE, LARGE),
        (5120, 12800, WIDE, LARGE),
        (8192, 14336, WIDE, LARGE),
        (512, 3072, NARROW, NARROW),
        (3072, 256, WIDE, NARROW),
    ],
)
def test_dense_layers_on_gb10(size_n: int, size_k: int, one: Tile, many: Tile) -> None:
    """The published emulation: for 1, 16 and 64 rows."""
    memory = {WIDE: 50176, NARROW: 33280}
    for rows, blocks, tile in ((1, 1, one), (16, 1, one), (64, 4, many)):
        gemm = Gemm(False, rows, size_n, size_k, 128, "uint4b8")
        assert choose(gemm, GB10, {}) == Choice(tile, 1, blocks)
        assert shared_bytes(tile, gemm) == (memory[tile] if rows <= 16 else {NARROW: 82432, LARGE: 68608}[tile])


def test_many_rows_of_a_dense_layer_come_in_pieces() -> None:
    """64 rows of 2560 columns leave multiprocessors without work; 640 rows do not."""
    assert choose(Gemm(False, 64, 2560, 2048, 128, "uint4b8"), GB10, {}) == Choice(NARROW, 1, 4)
    assert choose(Gemm(False, 640, 2560, 2048, 128, "uint4b8"), GB10, {}) == Choice(LARGE, 1, 4)


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
def test_shapes_that_no_tile_takes(change: dict[str, object], words: str) -> None:
    assert shape_fault(w13(1)) is None
    fault = shape_fault(dataclasses.replace(w13(1), **change))  # type: ignore[arg-type]
    assert fault is not None
    assert words in fault


@pytest.mark.parametrize(
    ("tile", "blocks", "words"),
    [
        (Tile.asked(32, 128), 1, "less than 64"),
        (Tile.asked(256, 64), 1, "256x64"),
        (Tile.asked(64, 256), 1, "64x256"),
        (Tile.asked(128, 128), 2, "a block may have"),
        (Tile.asked(64, 128), 5, "blocks_per_sm is 5"),
        (Tile.asked(64, 128), 0, "blocks_per_sm is 0"),
        (Tile.asked(64, 128), 4, "a block may have"),
    ],
)
def test_tiles_that_the_kernel_refuses(tile: Tile, blocks: int, words: str) -> None:
    fault = blocks_fault(blocks, tile, w13(1), GB10)
    assert fault is not None
    assert words in fault


def test_tiles_that_the_kernel_takes() -> None:
    assert blocks_fault(1, WIDE, w13(1), GB10, 118) is None
    assert blocks_fault(2, NARROW, w13(1), GB10, 118) is None
    assert blocks_fault(3, DEEP, w13(1), GB10, 94) is None


def test_blocks_that_would_wait_for_blocks_that_never_start() -> None:
    """Shared memory would do for three, registers do not."""
    assert blocks_fault(3, DEEP, w13(1), GB10) is None
    assert "room for 2 blocks" in str(blocks_fault(3, DEEP, w13(1), GB10, 255))


@given(
    rows=st.integers(1, 4096),
    columns=st.integers(1, 64),
    depth=st.integers(1, 64),
    quant=st.sampled_from(sorted(QUANTIZATIONS)),
    group=st.sampled_from([-1, 16, 32, 64, 128]),
    moe=st.booleans(),
    registers=st.integers(16, 168),
)
def test_what_the_kernel_chooses_it_takes(
    rows: int, columns: int, depth: int, quant: str, group: int, moe: bool, registers: int
) -> None:
    gemm = Gemm(moe, rows, 64 * columns, 64 * depth, group, quant, block_size_m(rows, 8, 128) if moe else 8)
    chosen = choose(gemm, GB10, lambda tile: registers)
    if shape_fault(gemm) is not None:
        return
    if chosen is None:  # no tile fits into shared memory, at any number of rows
        limit = GB10.shared_bytes - 512
        assert all(tile_fault(tile, gemm, limit) is not None for tile in compiled_tiles(gemm.m_blocks))
        return
    assert 1 <= chosen.blocks_per_sm <= MAXIMUM_BLOCKS_PER_SM
    taken = gemm if moe else dataclasses.replace(gemm, rows=min(rows, 16 * chosen.m_blocks))
    assert blocks_fault(chosen.blocks_per_sm, chosen.tile, taken, GB10) is None


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
    assert shape_fault(Gemm(False, 1, padded_n, padded_k, group, "uint4b8")) is None
    assert padded_dense(padded_n, padded_k, group) == (padded_n, padded_k)
