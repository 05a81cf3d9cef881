"""What vLLM's FusedMoE kernels run with where no table is found, and a table that says the same.

The rule of `get_default_config` in vLLM's `fused_moe.py` for NVIDIA GPUs, alike in 0.26 to 0.33. The 4-bit kernel is
left out: its default depends on the experts of a token, which a table's name does not say.
"""

from __future__ import annotations

from vllm_spark.tuning.fused_moe_table import FusedMoeShape, FusedMoeTable

LARGE_TOKENS = 1024
"""From here on a step is prefill: a table that ends before would be used for it all the same."""

_PINNED = tuple(2**power for power in range(14))  # 1 to 8192


def has_default(shape: FusedMoeShape) -> bool:
    """Whether the default is known here."""
    return shape.dtype in (None, "fp8_w8a8")


def default_row(shape: FusedMoeShape, tokens: int) -> dict[str, int]:
    """The kernel's parameters for a step of `tokens` without a table.

    Raises:
        ValueError: for the 4-bit and 8-bit integer kernels.
    """
    if not has_default(shape):
        raise ValueError(f"the default of {shape.dtype} is not known")
    if shape.dtype == "fp8_w8a8" and shape.block_shape is not None:
        return _fp8_block(shape.block_shape, tokens)
    return _general(shape, tokens)


def _fp8_block(block: tuple[int, int], tokens: int) -> dict[str, int]:
    narrow = tokens <= 8 and block[0] % 64 == 0
    return _row(
        m=16 if tokens <= 64 else 64,
        n=64 if narrow else block[0],
        k=block[1],
        group=1 if tokens <= 16 else 32,
        warps=4,
        stages=4 if narrow and tokens <= 4 else 3,
    )


def _general(shape: FusedMoeShape, tokens: int) -> dict[str, int]:
    few = tokens <= 64
    return _row(
        m=next((size for limit, size in ((32, 16), (96, 32), (512, 64)) if tokens <= limit), 128),
        n=64 if few else 128,
        k=128 if few or shape.dtype == "fp8_w8a8" else 64,
        group=16 if tokens // shape.experts > 128 else 1,
        warps=4 if tokens <= 128 else 8,
        stages=4 if tokens <= 32 else 3,
    )


def _row(m: int, n: int, k: int, group: int, warps: int, stages: int) -> dict[str, int]:
    return {
        "BLOCK_SIZE_M": m,
        "BLOCK_SIZE_N": n,
        "BLOCK_SIZE_K": k,
        "GROUP_SIZE_M": group,
        "SPLIT_K": 1,
        "num_warps": warps,
        "num_stages": stages,
    }


def default_table(shape: FusedMoeShape) -> FusedMoeTable:
    """A table that gives every step what it would get without one.

    vLLM takes the nearest key. So there is a key on both sides of every place where the default changes.

    Args:
        shape: of the table; its default must be known (`has_default`).
    """
    keys = {1, *_PINNED, *default_changes(shape)}
    return FusedMoeTable({key: default_row(shape, key) for key in sorted(keys)})


def default_changes(shape: FusedMoeShape) -> list[int]:
    """Both numbers of tokens around each change of the default: 8 and 9 where it is another from 9 on."""
    last = [4, 8, 16, 64] if shape.block_shape is not None else [32, 64, 96, 128, 512, 129 * shape.experts - 1]
    return [tokens for end in last for tokens in (end, end + 1)]
