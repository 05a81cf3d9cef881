"""Compiles rows of a FusedMoE table, each in a process of its own, so that a compiler that hangs costs one row.

`python -m vllm_spark.tuning.fused_moe_trial JSON` is such a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vllm_spark.errors import SparkError
from vllm_spark.tuning.fused_moe_compile import CompileError, compile_row
from vllm_spark.tuning.fused_moe_shape import FusedMoeParameters
from vllm_spark.tuning.fused_moe_table import FusedMoeShape
from vllm_spark.tuning.gb10 import Device

SECONDS = 60.0
"""That a row may take to be compiled: the usual is one or two."""

_PAUSE = 0.02  # seconds between two looks at the processes


class Trials:
    """Says what is wrong with rows, and compiles none twice: shapes of one format share their kernels.

    Args:
        device: for which is compiled, and whose shared memory there is.
        processes: at once; None for half of the processors.
        seconds: that one may take.
    """

    def __init__(self, device: Device, processes: int | None = None, seconds: float = SECONDS):
        self._device, self._seconds = device, seconds
        self._processes = processes or max(1, (os.cpu_count() or 2) // 2)
        self._known: dict[tuple[str | None, tuple[int, int] | None], dict[FusedMoeParameters, str | None]] = {}

    def usable(
        self, shape: FusedMoeShape, rows: Iterable[FusedMoeParameters], on_row: Callable[[], None] = lambda: None
    ) -> list[FusedMoeParameters]:
        """Those that compile in time, fit into shared memory and do not spill, in their order.

        Args:
            shape: of the table.
            rows: to be tried.
            on_row: called when one more is known.

        Raises:
            SparkError: there are some, and none of them will do.
        """
        rows = list(rows)
        known = self._known.setdefault((shape.dtype, shape.block_shape), {})
        self._compile(shape, [row for row in rows if row not in known], known, on_row)
        good = [row for row in rows if known[row] is None]
        if rows and not good:
            raise SparkError(f"not one of {len(rows)} kernels can be used for {shape}: {known[rows[0]]}")
        return good

    def _compile(
        self,
        shape: FusedMoeShape,
        rows: list[FusedMoeParameters],
        known: dict[FusedMoeParameters, str | None],
        on_row: Callable[[], None],
    ) -> None:
        waiting = rows[::-1]
        running: dict[FusedMoeParameters, tuple[subprocess.Popen[str], float]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._processes:
                    row = waiting.pop()
                    running[row] = (self._started(shape, row), time.monotonic() + self._seconds)
                for row, (process, deadline) in list(running.items()):
                    if process.poll() is not None:
                        fault = self._fault(_end(process))
                    elif time.monotonic() > deadline:
                        _end(process)
                        fault = f"it takes more than {self._seconds:g} s to compile"
                    else:
                        continue
                    del running[row]
                    known[row] = fault
                    on_row()
                time.sleep(_PAUSE)
        finally:
            for process, _ in running.values():
                _end(process)

    def _started(self, shape: FusedMoeShape, row: FusedMoeParameters) -> subprocess.Popen[str]:
        what = [[shape.experts, shape.size_n, shape.dtype, shape.block_shape], row.row(), self._device.capability]
        command = [sys.executable, "-m", "vllm_spark.tuning.fused_moe_trial", json.dumps(what)]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def _fault(self, output: str) -> str | None:
        try:
            found: dict[str, Any] = json.loads(output.splitlines()[-1])
        except (IndexError, ValueError):
            return "the compiler ended without a word"
        if "fault" in found:
            return str(found["fault"])
        if (needed := found["shared_bytes"]) > (limit := self._device.shared_bytes):
            return f"it needs {needed} bytes of shared memory, and a block may have {limit}"
        if found["spilled_bytes"]:
            return f"each thread spills {found['spilled_bytes']} bytes for want of registers"
        return None


@dataclass(frozen=True)
class _Job:
    shape: FusedMoeShape
    row: dict[str, int]
    capability: tuple[int, int]


def _job(text: str) -> _Job:
    (experts, size_n, dtype, block), row, (major, minor) = json.loads(text)
    return _Job(FusedMoeShape(experts, size_n, dtype, tuple(block) if block else None), row, (major, minor))


def _end(process: subprocess.Popen[str]) -> str:
    """Makes sure that it has ended; returns what it printed, which is a line and fits into the pipe."""
    if process.poll() is None:
        process.kill()
    return process.communicate()[0]


def main() -> None:
    """Compiles the row of the command line, and prints what it takes, or why it does not compile."""
    job = _job(sys.argv[1])
    try:
        compiled = compile_row(job.shape, job.row, job.capability)
        found: dict[str, Any] = {"shared_bytes": compiled.shared_bytes, "spilled_bytes": compiled.spilled_bytes}
    except CompileError as error:
        found = {"fault": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
