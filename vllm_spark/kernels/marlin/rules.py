"""Parameters that Marlin's kernels accept, and their use of shared memory.

Facts of vLLM's CUDA sources, alike in 0.26 to 0.33 for weights without act-order: the experts' kernel in
`csrc/**/moe/marlin_moe_wna16/ops.cu`, the dense one in `csrc/**/quantization/marlin/marlin.cu`, the compiled variants
in `generate_kernels.py` beside each. Activations have 16 bits throughout, and the GPU four pipeline stages (compute
capability 8.0 and later).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vllm_spark.kernels.devices import Device

STAGES = 4
MINIMUM_TILE = 64
"""Of thread_k and of thread_n."""
MAXIMUM_BLOCKS_PER_SM = 4
"""vLLM's locks and the kernel's scratch memory cover four blocks for each multiprocessor."""
BLOCK_SIZES_M = (8, 16, 32, 48, 64)
"""Rows of one expert in a tile, in the order in which vLLM tries them."""


@dataclass(frozen=True, order=True)
class Tile:
    """The thread_k x thread_n weights that one thread block of `threads` threads multiplies."""

    thread_k: int
    thread_n: int
    threads: int

    @classmethod
    def requested(cls, thread_k: int, thread_n: int) -> Tile:
        """The tile for the arguments of the experts' kernel, which derives the threads from the size."""
        return cls(thread_k, thread_n, thread_k * thread_n // 64)


SMALL_TILES = (Tile(128, 128, 256), Tile(64, 128, 128), Tile(128, 64, 128))
"""For one block of 16 rows or less, in the kernel's order of preference."""
LARGE_TILES = (Tile(64, 256, 256), Tile(64, 128, 128), Tile(128, 64, 128))
"""For more rows."""


@dataclass(frozen=True)
class Quantization:
    """A type of weights that Marlin is compiled for.

    Attributes:
        bits: of one weight.
        zero_points: whether groups have one (AWQ).
        group_sizes: that there are kernels for; -1 for one scale in a column.
    """

    bits: int
    zero_points: bool
    group_sizes: tuple[int, ...]


QUANTIZATIONS: Mapping[str, Quantization] = MappingProxyType(
    {
        "uint4b8": Quantization(4, False, (-1, 32, 64, 128)),
        "uint4": Quantization(4, True, (-1, 32, 64, 128)),
        "uint8b128": Quantization(8, False, (-1, 32, 64, 128)),
        "float8_e4m3fn": Quantization(8, False, (-1, 32, 128)),
        "float4_e2m1f": Quantization(4, False, (16, 32)),
    }
)
"""By the name of vLLM's scalar type."""


@dataclass(frozen=True)
class Gemm:
    """One matrix multiplication by Marlin.

    Attributes:
        moe: whether it is the experts' kernel, else the dense one.
        size_n: output width.
        size_k: input width.
        group_size: weights that share a scale; -1, or `size_k`, for one scale in a column.
        quant_type: a name in `QUANTIZATIONS`.
        block_size_m: rows of an expert in a tile, of `BLOCK_SIZES_M`; experts only, since the dense kernel
            chooses its tiles itself.
    """

    moe: bool
    size_n: int
    size_k: int
    group_size: int
    quant_type: str
    block_size_m: int = 8

    @property
    def m_blocks(self) -> int:
        """Blocks of 16 rows in a tile."""
        return math.ceil(self.block_size_m / 16)

    @property
    def kernel_group_size(self) -> int:
        """As the kernel gets it: -1 for a single group."""
        return -1 if self.group_size == self.size_k else self.group_size


def block_size_m(rows: int, top_k: int, experts: int) -> int:
    """vLLM's choice of an expert's rows in a tile, for a number of tokens."""
    for size in BLOCK_SIZES_M:
        if rows * top_k / experts / size < 0.9:
            return size
    return BLOCK_SIZES_M[-1]


def compiled_tiles(m_blocks: int) -> tuple[Tile, ...]:
    """The tiles that kernels are compiled for."""
    return SMALL_TILES if m_blocks <= 1 else LARGE_TILES


def shared_bytes(tile: Tile, gemm: Gemm) -> int:
    """Bytes of shared memory that the buffers of the experts' kernel need; it is launched with the device's maximum."""
    quantization = QUANTIZATIONS[gemm.quant_type]
    rows = 16 * gemm.m_blocks
    inputs = STAGES * rows * tile.thread_k * 2
    weights = STAGES * tile.thread_k * tile.thread_n * quantization.bits // 8
    sums = rows * (tile.thread_n + 8) * 2
    groups = 1 if gemm.kernel_group_size == -1 else math.ceil(tile.thread_k / gemm.kernel_group_size)
    scales = STAGES * groups * tile.thread_n * 2
    zero_points = scales * quantization.bits // 16 if quantization.zero_points else 0
    tokens = 16 * rows  # of which expert's which row is, twice, and its weight
    # The sums reuse the weights' memory, and the bias lies behind them.
    reused = max(weights, sums, min(weights, sums) + 2 * tile.thread_n)
    return reused + inputs + scales + zero_points + tokens


def shape_fault(gemm: Gemm) -> str | None:
    """Why no tile fits this shape and these weights; None if one may."""
    quantization = QUANTIZATIONS.get(gemm.quant_type)
    if quantization is None:
        return f"Marlin has no kernel for {gemm.quant_type!r} weights; supported are {', '.join(QUANTIZATIONS)}"
    if gemm.kernel_group_size not in quantization.group_sizes:
        sizes = ", ".join(map(str, quantization.group_sizes))
        return f"Marlin has no kernel for {gemm.quant_type} with groups of {gemm.group_size}; supported are {sizes}"
    if gemm.kernel_group_size > 0 and gemm.size_k % gemm.kernel_group_size:
        return f"an input width of {gemm.size_k} is not a multiple of the group size {gemm.group_size}"
    if gemm.moe and gemm.block_size_m not in BLOCK_SIZES_M:
        return f"block_size_m is {gemm.block_size_m}; Marlin takes {', '.join(map(str, BLOCK_SIZES_M))}"
    divisible = any(gemm.size_n % tile.thread_n == gemm.size_k % tile.thread_k == 0 for tile in SMALL_TILES)
    if not divisible:
        return (
            f"no tile divides N={gemm.size_n}, K={gemm.size_k}; N must be a multiple of 64 and K of 128, "
            "or N of 128 and K of 64"
        )
    return None


def tile_fault(tile: Tile, gemm: Gemm, shared_limit: int) -> str | None:
    """Why the kernel refuses a tile; None if it accepts it.

    Args:
        tile: what a block would work on.
        gemm: the multiplication.
        shared_limit: bytes that one block may have.
    """
    if tile.thread_k < MINIMUM_TILE or tile.thread_n < MINIMUM_TILE:
        return f"thread_k={tile.thread_k}, thread_n={tile.thread_n} is less than {MINIMUM_TILE}"
    if tile not in compiled_tiles(gemm.m_blocks):
        known = ", ".join(f"{t.thread_k}x{t.thread_n}" for t in compiled_tiles(gemm.m_blocks))
        return f"no kernel is compiled for thread_k x thread_n = {tile.thread_k}x{tile.thread_n}; there are {known}"
    if gemm.size_n % tile.thread_n:
        return f"N={gemm.size_n} is not a multiple of thread_n={tile.thread_n}"
    if gemm.size_k % tile.thread_k:
        return f"K={gemm.size_k} is not a multiple of thread_k={tile.thread_k}"
    if (needed := shared_bytes(tile, gemm)) > shared_limit:
        return f"it needs {needed} bytes of shared memory, and a block may have {shared_limit}"
    return None


def blocks_fault(blocks_per_sm: int, tile: Tile, gemm: Gemm, device: Device) -> str | None:
    """Why this number of blocks for each multiprocessor is invalid for a tile; None if it is valid.

    All blocks must be resident at once: the first blocks of a column wait for its last ones, so the kernel would hang
    if those could not start.

    Args:
        blocks_per_sm: started for each multiprocessor.
        tile: what each works on.
        gemm: the multiplication.
        device: on which.
    """
    if not 1 <= blocks_per_sm <= MAXIMUM_BLOCKS_PER_SM:
        return f"blocks_per_sm is {blocks_per_sm}; Marlin's locks cover 1 to {MAXIMUM_BLOCKS_PER_SM}"
    limit = device.shared_bytes
    if blocks_per_sm > 1:
        limit = device.shared_bytes // blocks_per_sm - 1024
    if (fault := tile_fault(tile, gemm, limit)) is not None:
        return f"with {blocks_per_sm} blocks for each multiprocessor: {fault}"
    if blocks_per_sm * tile.threads > device.threads_per_multiprocessor:
        return f"{blocks_per_sm} blocks of {tile.threads} threads are more than a multiprocessor holds"
    return None
