"""Trial compilations of rows of a FusedMoE table, each in its own process, so that a compiler that hangs costs one row.

`python -m vllm_spark.tune.fused_moe.trial JSON` is such a process. It starts the assembler, so each process has its
own process group, which is killed as a whole.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vllm_spark.errors import SparkError
from vllm_spark.kernels.devices import Device
from vllm_spark.kernels.fused_moe.compile import INT4, CompileError, compile_row
from vllm_spark.kernels.fused_moe.shapes import FusedMoeParameters
from vllm_spark.kernels.fused_moe.table import FusedMoeShape
from vllm_spark.models.weights import Int4
from vllm_spark.processes.child import end_with_parent, python_module

SECONDS = 60.0
"""Time limit for compiling a row, which usually takes one or two seconds."""

_PAUSE = 0.02  # seconds between polls of the processes
_OUTPUT_SECONDS = 5.0  # time limit for reading the output of a process that has exited
_PROCESSOR_SECONDS = 300  # CPU time limit, which stops an assembler whose parent was killed with SIGKILL


class Trials:
    """Compiles rows in parallel and checks their use of resources; shapes of one format share compiled kernels.

    Args:
        device: the target of the compilation.
        processes: number of parallel processes; None for half of the processors.
        seconds: time limit of each process.
    """

    def __init__(self, device: Device, processes: int | None = None, seconds: float = SECONDS):
        self._device, self._seconds = device, seconds
        self._processes = processes or max(1, (os.cpu_count() or 2) // 2)
        self._known: dict[_Format, dict[FusedMoeParameters, str | None]] = {}

    def usable(
        self,
        shape: FusedMoeShape,
        rows: Iterable[FusedMoeParameters],
        on_row: Callable[[], None] = lambda: None,
        int4: Int4 = INT4,
    ) -> list[FusedMoeParameters]:
        """The rows that compile in time, fit into shared memory and do not spill, in their order.

        Args:
            shape: of the table.
            rows: to compile.
            on_row: called after each row.
            int4: how 4-bit weights are stored, which the table's name does not say.

        Raises:
            SparkError: there are rows, and none of them is usable.
        """
        rows = list(rows)
        known = self._known.setdefault((shape.dtype, shape.block_shape, int4), {})
        self._compile(_Kernel(shape, int4), [row for row in rows if row not in known], known, on_row)
        good = [row for row in rows if known[row] is None]
        if rows and not good:
            raise SparkError(f"none of {len(rows)} kernels can be used for {shape}: {known[rows[0]]}")
        return good

    def _compile(
        self,
        kernel: _Kernel,
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
                    running[row] = (self._started(kernel, row), time.monotonic() + self._seconds)
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

    def _started(self, kernel: _Kernel, row: FusedMoeParameters) -> subprocess.Popen[str]:
        shape, int4 = kernel.shape, kernel.int4
        what = [
            [shape.experts, shape.size_n, shape.dtype, shape.block_shape],
            [int4.group_size, int4.zero_points],
            row.row(),
            self._device.capability,
        ]
        return subprocess.Popen(
            python_module("vllm_spark.tune.fused_moe.trial", json.dumps(what)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            preexec_fn=end_with_parent(os.getpid()),
        )

    def _fault(self, output: str) -> str | None:
        try:
            found: dict[str, Any] = json.loads(output.splitlines()[-1])
        except (IndexError, ValueError):
            return "the compiler exited without a result"
        if "fault" in found:
            return str(found["fault"])
        if (needed := found["shared_bytes"]) > (limit := self._device.shared_bytes):
            return f"it needs {needed} bytes of shared memory, and a block may have {limit}"
        if found["spilled_bytes"]:
            return f"each thread spills {found['spilled_bytes']} bytes of registers to memory"
        return None


_Format = tuple[str | None, tuple[int, int] | None, Int4]


@dataclass(frozen=True)
class _Kernel:
    shape: FusedMoeShape
    int4: Int4


@dataclass(frozen=True)
class _Job:
    kernel: _Kernel
    row: dict[str, int]
    capability: tuple[int, int]


def _job(text: str) -> _Job:
    (experts, size_n, dtype, block), int4, row, (major, minor) = json.loads(text)
    shape = FusedMoeShape(experts, size_n, dtype, tuple(block) if block else None)
    return _Job(_Kernel(shape, Int4(*int4)), row, (major, minor))


def _end(process: subprocess.Popen[str]) -> str:
    """Stops the process and its children; returns its output, a line that fits into the pipe's buffer."""
    if process.poll() is None:
        _kill_group(process)
    try:
        return process.communicate(timeout=_OUTPUT_SECONDS)[0]
    except subprocess.TimeoutExpired:  # it has exited, and its assembler still holds the pipe
        _kill_group(process)
    with suppress(subprocess.TimeoutExpired):
        return process.communicate(timeout=_OUTPUT_SECONDS)[0]
    return ""


def _kill_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    """Compiles the row of the command line, and prints its use of resources, or an error."""
    job = _job(sys.argv[1])
    # The kernel kills this process with the tuner, but not the assembler, which inherits this limit.
    resource.setrlimit(resource.RLIMIT_CPU, (_PROCESSOR_SECONDS, _PROCESSOR_SECONDS))
    try:
        compiled = compile_row(job.kernel.shape, job.row, job.capability, int4=job.kernel.int4)
        found: dict[str, Any] = {"shared_bytes": compiled.shared_bytes, "spilled_bytes": compiled.spilled_bytes}
    except CompileError as error:
        found = {"fault": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
