"""What tables cost a call of Marlin's operator for experts, in nanoseconds: with a row for it, without, and unhooked.

    python -m benchmarks.marlin_hook [--calls 20000] [--rounds 15]

The operator is a function with vLLM's parameters that does nothing, so no GPU is needed and only Python is measured.
The arguments are those of a decode step of Qwen3-30B-A3B in int4 on one of two ranks. The candidates take turns in
every round. Times are of the processor, so other programs on the machine matter little.
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import vllm._custom_ops as ops
from rich.console import Console
from rich.table import Table
from vllm.scalar_type import scalar_types

from vllm_spark.bench.statistics import machine
from vllm_spark.compat.patching import all_patches
from vllm_spark.kernels import lookup, runtime
from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.marlin import table as marlin_table
from vllm_spark.kernels.marlin.table import MarlinRow, MarlinShape, MarlinTable, store_marlin_table
from vllm_spark.kernels.table import Provenance

SHAPE = MarlinShape(
    kernel="moe_w13", experts=128, top_k=8, size_n=768, size_k=2048, group_size=128, quant_type="uint4b8"
)
OTHER = SHAPE.model_copy(update={"size_n": 1536})
TILE = {"thread_k": 128, "thread_n": 64, "blocks_per_sm": 2}
SOURCE = Provenance(kind="derived", rule="for this benchmark")

Call = Callable[..., Any]


def arguments() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As vLLM passes them: tensors by position, sizes by name."""
    names = list(inspect.signature(ops.moe_wna16_marlin_gemm).parameters)
    values = {
        "b_qweight": torch.empty(1),
        "b_scales": torch.empty(SHAPE.experts, SHAPE.size_k // SHAPE.group_size, SHAPE.size_n),
        "workspace": torch.empty(4 * GB10.multiprocessors),
        "topk_weights": torch.empty(1, SHAPE.top_k),
        "moe_block_size": 8,
        "top_k": SHAPE.top_k,
        "b_q_type": scalar_types.uint4b8,
        "size_m": 1,
        "size_n": SHAPE.size_n,
        "size_k": SHAPE.size_k,
    }
    first = names.index("moe_block_size")
    by_name = names[first : names.index("thread_k")]
    return tuple(values.get(name) for name in names[:first]), {name: values.get(name) for name in by_name}


def operator() -> Call:
    """A function with the operator's parameters that returns at once."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    nothing.__signature__ = inspect.signature(ops.moe_wna16_marlin_gemm)  # type: ignore[attr-defined]
    return nothing


@contextmanager
def tables(shapes: Mapping[MarlinShape, Mapping[str, int]]) -> Iterator[None]:
    """This user's tables are those of `shapes`, and no others are there, on a device named as a GB10."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CONFIG_HOME"] = folder
        place = lookup.user_folder()
        assert place is not None
        for shape, tile in shapes.items():
            row = MarlinRow.model_validate({**tile, "block_size_m": 8, "provenance": SOURCE})
            store_marlin_table(
                MarlinTable(device=GB10.name, shape=shape, rows={1: row, 2: row}), place / marlin_table.FOLDER
            )
        runtime.start()
        try:
            yield
        finally:
            runtime.stop(runtime._WHOLE_PROCESS)


def hooked() -> Call:
    """The operator as the patch makes it."""
    patch = next(patch for patch in all_patches() if patch.name == "marlin-parameters")
    return patch.replace(operator())


def nanoseconds(call: Call, calls: int) -> float:
    """Processor time of one call, mean of `calls`."""
    args, kwargs = arguments()
    call(*args, **kwargs)  # reads the tables
    start = time.thread_time_ns()
    for _ in range(calls):
        call(*args, **kwargs)
    return (time.thread_time_ns() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    runtime.device_name = lambda: GB10.name  # type: ignore[assignment]
    runtime.this_device = lambda: GB10  # type: ignore[assignment]
    lookup.configs_folder = lambda: Path("/nonexistent")  # type: ignore[attr-defined]
    candidates: dict[str, Mapping[MarlinShape, Mapping[str, int]] | None] = {
        "no table for the model's layers: vLLM's own function": None,
        "hook, no table": {},
        "hook, a table for another shape only": {OTHER: TILE},
        "hook, a table for this shape, row of vLLM's choice": {SHAPE: {}, OTHER: TILE},
        "hook, a table for this shape, tuned row": {SHAPE: TILE},
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(args.rounds):
        for name, shapes in candidates.items():
            if shapes is None:
                times[name].append(nanoseconds(operator(), args.calls))
                continue
            with tables(shapes):
                times[name].append(nanoseconds(hooked(), args.calls))
    table = Table(
        title="A call of Marlin's operator for experts, nanoseconds of processor time", caption=str(machine())
    )
    for heading in ("", "median", "minimum", "more than without a hook"):
        table.add_column(heading, justify="left" if not heading else "right")
    base = statistics.median(next(iter(times.values())))
    for name, its in times.items():
        median = statistics.median(its)
        table.add_row(name, f"{median:.0f}", f"{min(its):.0f}", f"{median - base:.0f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
