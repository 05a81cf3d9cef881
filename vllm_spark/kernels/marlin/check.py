"""Checks a table of Marlin's parameters against the kernel's own rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from vllm_spark.errors import ConfigurationError
from vllm_spark.kernels.devices import DEVICES, GB10
from vllm_spark.kernels.finding import Finding, device_findings, provenance_findings, reach_findings
from vllm_spark.kernels.marlin.rules import Gemm, Tile, block_size_m, blocks_fault, shape_fault
from vllm_spark.kernels.marlin.table import MarlinRow, MarlinTable, load_marlin_table
from vllm_spark.kernels.table import VLLM_DEFAULT

_WITHOUT_LIMITS = dataclasses.replace(GB10, shared_bytes=2**40, threads_per_multiprocessor=2**40)
"""For devices whose limits are not known: only the rules for every GPU remain."""

_ATOMIC_WIDTH = 2048  # the dense kernel adds atomically up to so many outputs for each 64 rows


def check_marlin_table(path: Path) -> Iterator[Finding]:
    """All errors and notes about the table in `path`."""
    try:
        table = load_marlin_table(path)
    except ConfigurationError as error:
        yield Finding(path, None, "error", str(error))
        return
    if path.name != table.file_name:
        yield Finding(
            path,
            None,
            "error",
            f"its content requires the name {table.file_name}; serving does not find it under this one",
        )
    yield from device_findings(path, table.device, (row.provenance for row in table.rows.values()))
    first = _gemm(table, min(table.rows))
    if (fault := shape_fault(first)) is not None:
        yield Finding(path, None, "error", fault)
        return
    for rows, entry in sorted(table.rows.items()):
        yield from _check_row(path, table, rows, entry)
        yield from provenance_findings(path, rows, table.device, entry.provenance)
    yield from reach_findings(path, table.rows)
    if not table.effective_rows:
        yield Finding(path, None, "note", "it has no effect, since each row is vLLM's choice, and can be removed")
    if table.shape.kernel != "dense":
        yield from _check_block_sizes(path, table)


def _gemm(table: MarlinTable, rows: int) -> Gemm:
    shape = table.shape
    moe = shape.kernel != "dense"
    return Gemm(
        moe=moe,
        size_n=shape.size_n,
        size_k=shape.size_k,
        group_size=shape.group_size,
        quant_type=shape.quant_type,
        block_size_m=block_size_m(rows, shape.top_k, shape.experts) if moe else 8,
    )


def _check_row(path: Path, table: MarlinTable, rows: int, entry: MarlinRow) -> Iterator[Finding]:
    gemm = _gemm(table, rows)
    if not gemm.moe:
        if not entry.uses_default_tile or entry.block_size_m is not None:
            yield Finding(
                path, rows, "error", "the dense kernel takes no tile; leave thread_k, thread_n, blocks_per_sm out"
            )
        pieces = -(-rows // 64)
        if entry.use_atomic_add and pieces * gemm.size_n > _ATOMIC_WIDTH:
            width = f"{pieces * gemm.size_n} outputs (rows in 64s, times N)"
            yield Finding(path, rows, "error", f"use_atomic_add has no effect above {_ATOMIC_WIDTH}: there are {width}")
        return
    if entry.block_size_m != gemm.block_size_m:
        yield Finding(
            path,
            rows,
            "error",
            f"block_size_m is {entry.block_size_m}, and vLLM uses {gemm.block_size_m} for {rows} tokens; "
            "the row is never used",
        )
    if (source := entry.provenance) is not None and source.rule == VLLM_DEFAULT and entry.has_effect:
        values = entry.model_dump(
            include={"thread_k", "thread_n", "blocks_per_sm", "use_atomic_add", "use_fp32_reduce"}
        )
        settings = ", ".join(f"{name}={value}" for name, value in values.items())
        yield Finding(
            path,
            rows,
            "error",
            f"its provenance says that vLLM chooses, but it sets {settings}; correct its provenance",
        )
    if entry.uses_default_tile:
        return
    if entry.thread_k == -1 or entry.thread_n == -1:
        yield Finding(
            path,
            rows,
            "error",
            f"thread_k={entry.thread_k}, thread_n={entry.thread_n}, blocks_per_sm={entry.blocks_per_sm}: "
            "the kernel takes a whole tile or none, and blocks only with a tile",
        )
        return
    tile = Tile.requested(entry.thread_k, entry.thread_n)
    if (fault := blocks_fault(entry.blocks, tile, gemm, DEVICES.get(table.device, _WITHOUT_LIMITS))) is not None:
        yield Finding(path, rows, "error", fault)


def _check_block_sizes(path: Path, table: MarlinTable) -> Iterator[Finding]:
    """A step between two rows uses the nearest, which must have the block size that vLLM uses for the step."""
    for tokens in range(1, max(table.rows)):
        entry = table.row(tokens)
        expected = block_size_m(tokens, table.shape.top_k, table.shape.experts)
        if tokens not in table.rows and entry is not None and entry.block_size_m != expected:
            yield Finding(
                path,
                None,
                "error",
                f"steps of {tokens} tokens take a row for block_size_m={entry.block_size_m}, and vLLM takes {expected} "
                "for them; add a row",
            )
            return
