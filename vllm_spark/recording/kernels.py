"""Kernels of this process's GPU, from torch's profiler (CUPTI), also those of CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from vllm_spark.recording.records import Kernel

_HOST = 0  # torch's number of the CPU's device type
_CLOCK_READINGS = 50


class KernelRecorder:
    """Records kernels from `start` to `stop`; without a GPU it does nothing. For one thread."""

    def __init__(self) -> None:
        self._profiler: Any = None

    def start(self) -> None:
        """Starts the profiler, with kernels and launches only: the host's operators would slow its thread down."""
        import torch

        if not torch.cuda.is_available():
            return
        torch.cuda.synchronize()  # excludes earlier kernels
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        profiler.start()
        self._profiler = profiler

    def stop(self) -> None:
        """Ends the profiler, once everything that was launched has ended."""
        import torch

        if self._profiler is not None:
            torch.cuda.synchronize()
            self._profiler.stop()

    def taken(self) -> tuple[list[str], list[Kernel]]:
        """Names and kernels, in the order of their starts; empty without a GPU."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return [], []
        return kernels_of(profiler.profiler.kineto_results.events(), unix_minus_monotonic())


def kernels_of(events: Iterable[Any], unix_offset: int) -> tuple[list[str], list[Kernel]]:
    """Names and kernels of torch's events, in the order of their starts.

    Args:
        events: with `name`, `device_type`, `device_resource_id`, `start_ns`, `duration_ns` and `correlation_id`, which
            a kernel has in common with its launch.
        unix_offset: nanoseconds that the events' clock is ahead of `time.monotonic_ns()`.
    """
    listed = list(events)
    launches = {event.correlation_id(): event.start_ns() for event in listed if _on_host(event)}
    names: dict[str, int] = {}
    kernels = []
    for event in listed:
        if _on_host(event):
            continue
        start, launched = event.start_ns() - unix_offset, launches.get(event.correlation_id())
        kernels.append(
            Kernel(
                names.setdefault(event.name(), len(names)),
                event.device_resource_id(),
                start,
                start + event.duration_ns(),
                0 if launched is None else launched - unix_offset,
            )
        )
    return list(names), sorted(kernels, key=lambda kernel: kernel.start)


def unix_minus_monotonic() -> int:
    """Nanoseconds between `time.time_ns()`, on which torch's events are, and `time.monotonic_ns()`.

    Of several readings the one that was interrupted least.
    """
    best = min(_reading() for _ in range(_CLOCK_READINGS))
    return best[1]


def _reading() -> tuple[int, int]:
    before, unix, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
    return after - before, unix - (before + after) // 2


def _on_host(event: Any) -> bool:
    return int(event.device_type()) == _HOST
