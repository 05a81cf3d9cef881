"""Checks a FusedMoE table: format, rules, and compilation of the kernels that it selects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from vllm_spark.errors import ConfigurationError
from vllm_spark.kernels.devices import DEVICES, Device
from vllm_spark.kernels.finding import Finding, device_findings, provenance_findings, reach_findings, spans
from vllm_spark.kernels.fused_moe.compile import INT4, Compiled, CompileError
from vllm_spark.kernels.fused_moe.shapes import (
    CUDA_TOKENS_OF_AN_EXPERT,
    INT4_GROUPS,
    INT4_GROUPS_IN_TILE,
    LARGE_TOKENS,
    default_row,
    has_default,
)
from vllm_spark.kernels.fused_moe.table import (
    FusedMoeProvenance,
    FusedMoeShape,
    FusedMoeTable,
    load_fused_moe_provenance,
    load_fused_moe_table,
    provenance_path,
    read_file_name,
)
from vllm_spark.kernels.fused_moe.vllm_rows import effective_rows, repeats_vllm
from vllm_spark.kernels.table import VLLM_DEFAULT
from vllm_spark.models.weights import Int4


class Compile(Protocol):
    """The signature of `compile.compile_row`."""

    def __call__(
        self, shape: FusedMoeShape, row: Mapping[str, int], capability: tuple[int, int], *, int4: Int4
    ) -> Compiled: ...


DTYPES = (None, "fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16")
"""Those of vLLM's tables for NVIDIA GPUs; None is bfloat16 or float16."""

_BLOCKS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K")
_NEEDED = (*_BLOCKS, "GROUP_SIZE_M", "num_warps", "num_stages")
_KNOWN = (*_NEEDED, "SPLIT_K")
_POWERS = (*_BLOCKS, "num_warps")
_CHECKED_TOKENS = 16_384

_LARGEST_TOP_K = 32
"""A table's name does not contain the number of experts of a token; no known model has more."""

_LARGEST_CUDA_BLOCK = 64
"""Rows of an expert in a block of vLLM's CUDA kernel for int4."""


def check_fused_moe_table(path: Path, compile_row: Compile | None, vllm_tables: Path | None) -> Iterator[Finding]:
    """All errors and notes about the table in `path`.

    Args:
        path: of the table; its provenance is in the same folder.
        compile_row: `compile.compile_row`, or None where it cannot run.
        vllm_tables: vLLM's own folder of tables, where it is installed.
    """
    named = read_file_name(path.name)
    if named is None:
        yield Finding(
            path,
            None,
            "error",
            f"{path.name} is not the name of a FusedMoE table; vLLM never reads a file of this name",
        )
        return
    shape, device_name = named
    try:
        table = load_fused_moe_table(path)
        provenance = load_fused_moe_provenance(path)
    except ConfigurationError as error:
        yield Finding(path, None, "error", str(error))
        return
    sources = FusedMoeProvenance() if provenance is None else provenance
    if provenance is None:
        yield Finding(path, None, "error", f"it has no provenance; add {provenance_path(path).name}")
    yield from device_findings(path, device_name, (sources.rows.get(row) for row in table.rows))
    if shape.dtype not in DTYPES:
        yield Finding(path, None, "error", f"dtype={shape.dtype} in its name is not one that vLLM uses on this GPU")
        return
    if provenance is not None:
        for row in table.rows:
            yield from provenance_findings(path, row, device_name, sources.rows.get(row))
        for row in sorted(set(sources.rows) - set(table.rows)):
            yield Finding(path, row, "error", "there is provenance for it, but no such row")
    yield from _check_reach(path, table)
    yield from _check_defaults(path, shape, table, sources)
    yield from _check_effect(path, shape, device_name, table, sources)
    if sources.is_all_default and vllm_tables is not None and (vllm_tables / path.name).is_file():
        yield Finding(
            path, None, "error", "it only repeats vLLM's default, and hides the table that comes with vLLM; remove it"
        )
    smallest_steps = {row: first for row, (first, _) in spans(table.rows, _CHECKED_TOKENS).items()}
    for row, values in table.rows.items():
        faults = list(_row_faults(shape, smallest_steps[row], values, sources.group_size))
        yield from (Finding(path, row, "error", fault) for fault in faults)
        if not faults and (device := DEVICES.get(device_name)) is not None:
            source = sources.rows.get(row)
            if source is not None and repeats_vllm(source):
                continue  # vLLM runs it without a table as well
            default = has_default(shape) and values == default_row(shape, row)
            int4 = INT4 if sources.group_size is None else Int4(sources.group_size)
            yield from _check_resources(path, row, shape, values, device, compile_row, int4, default)


def shared_bytes(shape: FusedMoeShape, row: Mapping[str, int]) -> int | None:
    """Shared memory that the kernel will need, in bytes: all stages but the one that is being used.

    Exact for bfloat16 and fp8, except that scales of blocks may add up to 512 bytes. Int4 weights are converted to 16
    bits in one buffer, and only inputs have stages. None for int8 weights with 16-bit inputs, where only the compiler
    knows.
    """
    if shape.dtype == "int8_w8a16":
        return None
    if shape.dtype == "int4_w4a16":
        return 2 * row["BLOCK_SIZE_K"] * ((row.get("num_stages", 3) - 1) * row["BLOCK_SIZE_M"] + row["BLOCK_SIZE_N"])
    size_k = row["BLOCK_SIZE_K"] if shape.block_shape is None else min(row["BLOCK_SIZE_K"], *shape.block_shape)
    width = 1 if _bytes(shape) else 2
    return (row["num_stages"] - 1) * (row["BLOCK_SIZE_M"] + row["BLOCK_SIZE_N"]) * size_k * width


def _check_reach(path: Path, table: FusedMoeTable) -> Iterator[Finding]:
    largest = max(table.rows)
    if largest < LARGE_TOKENS:
        yield Finding(
            path,
            largest,
            "error",
            "it is the largest row, so prefill of thousands of tokens uses it; "
            f"add rows up to {LARGE_TOKENS} or more, with vLLM's defaults if need be",
        )
    yield from reach_findings(path, table.rows)
    if list(table.rows) != sorted(table.rows):
        yield Finding(
            path, None, "error", "its rows are not in ascending order, which decides between two equally near rows"
        )


def _check_defaults(
    path: Path, shape: FusedMoeShape, table: FusedMoeTable, provenance: FusedMoeProvenance
) -> Iterator[Finding]:
    """A row with the provenance of vLLM's default must equal it for every step that uses the row."""
    if not has_default(shape):
        return
    for row, (first, last) in spans(table.rows, _CHECKED_TOKENS).items():
        source = provenance.rows.get(row)
        if source is None or source.rule != VLLM_DEFAULT:
            continue
        for tokens in range(first, last + 1):
            default = default_row(shape, tokens)
            if table.rows[row] != default:
                sentence = (
                    "its provenance is vLLM's default, but that differs for steps of "
                    f"{tokens} tokens, which use it: {_differences(default, table.rows[row])}; correct it, or its "
                    f"provenance in {provenance_path(path).name}"
                )
                yield Finding(path, row, "error", sentence)
                break


def _check_effect(
    path: Path, shape: FusedMoeShape, device: str, table: FusedMoeTable, provenance: FusedMoeProvenance
) -> Iterator[Finding]:
    """Rows that are noted as tuned and that vLLM chooses itself, and a table with no other rows."""
    effective = effective_rows(table.rows, provenance, shape, device)
    if not effective:
        yield Finding(path, None, "note", "it has no effect, since each row is vLLM's choice, and can be removed")
        return
    for row in table.rows:
        source = provenance.rows.get(row)
        if source is not None and not repeats_vllm(source) and row not in effective:
            yield Finding(path, row, "note", f"it is {source.kind}, and has no effect: it is vLLM's choice")


def _is_cuda(shape: FusedMoeShape, tokens: int) -> bool:
    """Whether vLLM 0.26 runs int4 experts with its CUDA kernel in a step of `tokens`, whatever `top_k` is."""
    return tokens * _LARGEST_TOP_K <= CUDA_TOKENS_OF_AN_EXPERT * shape.experts


def _differences(default: Mapping[str, int], row: Mapping[str, int]) -> str:
    """As in `num_warps=4, not 8`."""
    keys = [key for key in dict.fromkeys((*default, *row)) if default.get(key) != row.get(key)]
    return ", ".join(f"{key}={default.get(key, 'none')}, not {row.get(key, 'none')}" for key in keys)


def _row_faults(shape: FusedMoeShape, tokens: int, row: Mapping[str, int], group_size: int | None) -> Iterator[str]:
    """Why vLLM or Triton would fail in a step of `tokens`, the smallest that uses the row."""
    integers = shape.dtype == "int4_w4a16"
    needed = ("BLOCK_SIZE_M", "GROUP_SIZE_M") if integers else _NEEDED
    if gaps := [key for key in needed if key not in row]:
        yield f"it lacks {', '.join(gaps)}"
        return
    if unknown := [key for key in row if key not in _KNOWN]:
        yield f"the kernel has no parameter {', '.join(unknown)}, which vLLM passes to it; remove it"
        return
    if ("BLOCK_SIZE_N" in row) != ("BLOCK_SIZE_K" in row):
        yield "BLOCK_SIZE_N and BLOCK_SIZE_K go together: vLLM sets both if one is missing"
        return
    for key in (key for key in _POWERS if key in row):
        if row[key] < 1 or row[key] & (row[key] - 1):
            yield f"{key}={row[key]} is not a power of two"
            return
    if row.get("SPLIT_K", 1) != 1:
        yield f"SPLIT_K={row['SPLIT_K']} is not 1, the only value that vLLM uses"
    if row["GROUP_SIZE_M"] < 1:
        yield f"GROUP_SIZE_M={row['GROUP_SIZE_M']} is less than 1"
    if not 1 <= row.get("num_stages", 3) <= 16 or row.get("num_warps", 4) > 32:
        yield f"num_stages={row.get('num_stages')}, num_warps={row.get('num_warps')} is out of range (1 to 16, 1 to 32)"
    smallest = {"BLOCK_SIZE_M": 1 if integers else 16, "BLOCK_SIZE_N": 16, "BLOCK_SIZE_K": 32 if _bytes(shape) else 16}
    for key, least in smallest.items():
        if key in row and row[key] < least:
            yield f"{key}={row[key]} is less than {least}, the minimum of the kernel"
    if shape.block_shape is not None and row.get("BLOCK_SIZE_K", 0) > (limit := min(shape.block_shape)):
        yield (
            f"BLOCK_SIZE_K={row['BLOCK_SIZE_K']} is larger than the block of the weights, and the kernel uses {limit}; "
            f"write BLOCK_SIZE_K={limit}"
        )
    if integers and _is_cuda(shape, tokens) and row["BLOCK_SIZE_M"] > _LARGEST_CUDA_BLOCK:
        yield (
            f"BLOCK_SIZE_M={row['BLOCK_SIZE_M']} is more than {_LARGEST_CUDA_BLOCK}, the maximum of the CUDA kernel "
            "with which vLLM 0.26 runs steps of few tokens"
        )
    if integers and "BLOCK_SIZE_K" in row and tokens <= CUDA_TOKENS_OF_AN_EXPERT * shape.experts:
        # The CUDA kernel fails on other ratios. A token has one expert, at least.
        for group in INT4_GROUPS if group_size is None else (group_size,):
            if row["BLOCK_SIZE_K"] // group not in INT4_GROUPS_IN_TILE:
                yield (
                    f"BLOCK_SIZE_K={row['BLOCK_SIZE_K']} is {row['BLOCK_SIZE_K'] // group} groups of {group}, "
                    "and the CUDA kernel with which vLLM 0.26 runs steps of few tokens takes 1, 2, 4 or 8"
                )
                return


def _check_resources(
    path: Path,
    row: int,
    shape: FusedMoeShape,
    values: Mapping[str, int],
    device: Device,
    compile_row: Compile | None,
    int4: Int4,
    default: bool,
) -> Iterator[Finding]:
    """Whether the kernel fits the device's shared memory and registers."""
    if "BLOCK_SIZE_K" not in values:  # vLLM completes it
        return
    by_rule = shared_bytes(shape, values)
    limit = device.shared_bytes
    if by_rule is not None and by_rule > limit:
        yield Finding(path, row, "error", _too_much(by_rule, limit))
        return
    if compile_row is None:
        return
    try:
        taken = compile_row(shape, values, device.capability, int4=int4)
    except CompileError as error:
        yield Finding(path, row, "error", str(error))
        return
    if taken.shared_bytes > limit:
        yield Finding(path, row, "error", _too_much(taken.shared_bytes, limit))
    if taken.spilled_bytes:
        spilled = f"each thread spills {taken.spilled_bytes} bytes of registers to memory"
        if default:
            yield Finding(path, row, "note", f"{spilled}; it is vLLM's own default, which runs without a table too")
        else:
            yield Finding(path, row, "error", f"{spilled}; choose a smaller tile or more warps")


def _too_much(needed: int, limit: int) -> str:
    return f"it needs {needed} bytes of shared memory, and a block may have {limit}; the kernel cannot start"


def _bytes(shape: FusedMoeShape) -> bool:
    """Whether tensor cores multiply 8-bit values, whose minimum K is 32."""
    return shape.dtype in ("fp8_w8a8", "int8_w8a8")
