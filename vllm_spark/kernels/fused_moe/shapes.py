"""Shapes and parameters of vLLM's Triton kernel for experts, and vLLM's own choice of parameters for them.

That choice comes from a table that comes with vLLM, or else from a rule: `vllm_row` gives it for any step, and
`pinned_rows` makes rows that give every step the same as without a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from vllm_spark.kernels.fused_moe.compile import INT4, kernel_source
from vllm_spark.kernels.fused_moe.table import FusedMoeShape, load_fused_moe_table
from vllm_spark.models.weights import Int4

INT4_GROUPS = (32, 64, 128)
"""Group sizes for which vLLM's default has a rule of its own in steps of few tokens (`is_small_int4`)."""

INT4_GROUPS_IN_TILE = (1, 2, 4, 8)
"""Numbers of groups along a tile's depth that vLLM's CUDA kernel for int4 supports (`is_small_int4`)."""

CUDA_TOKENS_OF_AN_EXPERT = 6
"""Tokens of an expert, on average, up to which vLLM takes this kernel."""

Format = Literal["fp8_w8a8", "int4_w4a16"]
"""vLLM's names of the formats that are searched for; bfloat16 has no name (None)."""

LARGE_TOKENS = 1024
"""Steps from this size on are prefill. vLLM uses a table for them even if it has no such row."""

_LARGEST_PINNED = 8192


class FusedMoeParameters(BaseModel):
    """A row of a table, with vLLM's names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    BLOCK_SIZE_M: StrictInt = Field(gt=0)
    BLOCK_SIZE_N: StrictInt = Field(gt=0)
    BLOCK_SIZE_K: StrictInt = Field(gt=0)
    GROUP_SIZE_M: StrictInt = Field(default=1, gt=0)
    SPLIT_K: StrictInt = Field(default=1, gt=0)
    num_warps: StrictInt = Field(gt=0)
    num_stages: StrictInt = Field(gt=0)

    def row(self) -> dict[str, int]:
        """The row in a table."""
        return self.model_dump()


class FusedMoeExperts(BaseModel):
    """A block of experts of one rank; a table's name contains only some of these values.

    Attributes:
        experts: of this rank.
        top_k: experts of a token.
        hidden: width of the model.
        intermediate: an expert's inner width on this rank.
        dtype: as in `FusedMoeShape`.
        block_shape: of fp8 weights that share a scale, if they do in blocks.
        group_size: of int4 weights that share a scale; 0 for other weights.
        zero_points: whether groups of int4 weights have one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    experts: StrictInt = Field(gt=0)
    top_k: StrictInt = Field(gt=0)
    hidden: StrictInt = Field(gt=0)
    intermediate: StrictInt = Field(gt=0)
    dtype: Format | None = None
    block_shape: tuple[int, int] | None = None
    group_size: StrictInt = Field(default=0, ge=0)
    zero_points: bool = False

    @property
    def table(self) -> FusedMoeShape:
        """The shape of the table that it reads."""
        return FusedMoeShape(self.experts, self.intermediate, self.dtype, self.block_shape)

    @property
    def is_int4(self) -> bool:
        """Whether the weights are int4, which a kernel for packed weights multiplies."""
        return self.dtype == "int4_w4a16"

    @property
    def int4(self) -> Int4:
        """How the weights are stored, if they are int4."""
        return Int4(self.group_size, self.zero_points) if self.is_int4 else INT4

    def describe(self) -> str:
        """The shape as text, for tables and logs."""
        if self.is_int4:
            stored = f"int4, groups of {self.group_size}"
        elif self.dtype is None:
            stored = "bfloat16"
        else:
            stored = "fp8, " + ("a scale for a channel" if self.block_shape is None else "blocks of {} x {}").format(
                *(self.block_shape or ())
            )
        return f"{self.experts} experts, top {self.top_k} ({self.intermediate} of {self.hidden}, {stored})"


def vllm_row(shape: FusedMoeExperts, device: str, tokens: int) -> dict[str, int]:
    """vLLM's parameters for a step of `tokens` without a user's table: from its own table, or by its rule.

    With int4 weights, `BLOCK_SIZE_N` and `BLOCK_SIZE_K` are missing: vLLM adds them for each of the two GEMMs.

    Args:
        device: as in `devices.device_file_name`.
    """
    return _vllm_choice(shape, device)(tokens)


def vllm_has_table(shape: FusedMoeExperts, device: str) -> bool:
    """Whether a table for it comes with vLLM."""
    source = kernel_source()
    return source is not None and (source.parent / "configs" / shape.table.file_name(device)).is_file()


def pinned_rows(shape: FusedMoeExperts, device: str, above: int, upto: int | None = None) -> dict[int, dict[str, int]]:
    """Rows that give every step of more than `above` tokens, and at most `upto` if given, vLLM's own choice.

    vLLM uses the nearest row. So there is one at `above` + 1, one at each power of two, one on both sides of every
    change, and one at `upto`.
    """
    choose = _vllm_choice(shape, device)
    first, last = above + 1, upto or max(_LARGEST_PINNED, 129 * shape.experts)
    keys = {
        first,
        *([] if upto is None else [upto]),
        *(2**power for power in range(last.bit_length()) if 2**power > above),
    }
    before = choose(first)
    for tokens in range(first + 1, last + 1):
        now = choose(tokens)
        if now != before:
            keys |= {tokens - 1, tokens}
        before = now
    return {key: choose(key) for key in sorted(keys)}


def _vllm_choice(shape: FusedMoeExperts, device: str) -> Callable[[int], dict[str, int]]:
    source = kernel_source()
    if source is not None and vllm_has_table(shape, device):
        table = load_fused_moe_table(source.parent / "configs" / shape.table.file_name(device))
        return lambda tokens: dict(table.row(tokens))
    if shape.is_int4:
        return lambda tokens: _int4_row(shape, tokens)
    return lambda tokens: default_row(shape.table, tokens)


def _int4_row(shape: FusedMoeExperts, tokens: int) -> dict[str, int]:
    """The rule of vLLM 0.32 and 0.33.

    Earlier versions omit `GROUP_SIZE_M`, and do not round 3, 5, 6 and 7 rows up; the kernel supports neither.
    """
    if is_small_int4(shape, tokens):
        size_m = min(16, 1 << (tokens - 1).bit_length())
    else:
        size_m = next((size for limit, size in ((20, 16), (40, 32)) if tokens <= limit), 64)
    return {"BLOCK_SIZE_M": size_m, "GROUP_SIZE_M": 1, "SPLIT_K": 1}


def is_small_int4(shape: FusedMoeExperts, tokens: int) -> bool:
    """Whether vLLM's default for int4 follows the rule for few tokens in a step of `tokens`.

    In such a step vLLM's function `fused_experts` runs a CUDA kernel (`moe_wna16_gemm`), which has a tile, and neither
    `GROUP_SIZE_M`, warps nor stages. `benchmark_moe` measures that function, and vLLM 0.26 serves with it. The class
    that serves with `--moe-backend triton` since vLLM 0.27, `TritonWNA16Experts`, always runs Triton's kernel.
    """
    few = tokens * shape.top_k <= CUDA_TOKENS_OF_AN_EXPERT * shape.experts
    return shape.is_int4 and shape.group_size in INT4_GROUPS and few


def has_default(shape: FusedMoeShape) -> bool:
    """Whether vLLM's default for the format is implemented here."""
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
