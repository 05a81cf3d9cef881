"""Kernels of a decode step on rank 0's GPU, and their times.

That GPU's process records them: it may be the engine's own, or a worker's that the engine started. `start` and `stop`
are called there, by the way that every executor of vLLM has for functions of a caller's.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass
class KernelTime:
    """All kernels of one name; both figures are for one step."""

    name: str
    calls: float
    microseconds: float


@dataclasses.dataclass
class KernelProfile:
    """The longest first."""

    kernels: list[KernelTime]

    @property
    def busy(self) -> float:
        """Microseconds of one step in which the GPU was busy, provided that kernels do not overlap."""
        return sum(kernel.microseconds for kernel in self.kernels)


CallWorkers = Callable[..., list[Any]]
"""Calls a function with the worker of each rank and `args`, and returns the results by rank: `collective_rpc`."""


def profile_steps(call_workers: CallWorkers, run_step: Callable[[], bool], steps: int) -> KernelProfile | None:
    """Profiles `steps` calls of `run_step`; None if one of them ran no step (returned False), or without any kernel.

    The profiler slows down the host, not kernels. The time of a collective includes its wait for the other rank.
    """
    call_workers(start)
    complete = all(run_step() for _ in range(steps))
    profile: KernelProfile = call_workers(stop, args=(steps,))[0]
    return profile if complete and profile.kernels else None


_running: list[Any] = []
"""This process's profiler, from `start` to `stop`."""


def start(worker: Any) -> None:
    """Starts recording the kernels of this process, if `worker` is rank 0's."""
    import torch

    if worker.rank != 0:
        return
    activity = torch.profiler.ProfilerActivity.CPU  # which has no kernels
    if torch.cuda.is_available():
        activity = torch.profiler.ProfilerActivity.CUDA
        torch.cuda.synchronize()  # excludes earlier kernels
    profiler = torch.profiler.profile(activities=[activity])
    profiler.start()
    _running.append(profiler)


def stop(worker: Any, steps: int) -> KernelProfile | None:
    """The kernels of this process since `start`, for one of `steps` steps; None if `worker` is not rank 0's."""
    import torch

    if worker.rank != 0:
        return None
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    profiler = _running.pop()
    profiler.stop()
    return summary(profiler.key_averages(), steps)


def summary(events: Any, steps: int) -> KernelProfile:
    """Sums up events of torch's profiler (`key`, `count`, `self_device_time_total` in us) by kernel, for one step."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        if event.self_device_time_total > 0:
            total = totals[short_name(event.key)]
            total[0] += event.count / steps
            total[1] += event.self_device_time_total / steps
    kernels = [KernelTime(name, calls, microseconds) for name, (calls, microseconds) in totals.items()]
    return KernelProfile(sorted(kernels, key=lambda kernel: -kernel.microseconds))


def short_name(kernel: str) -> str:
    """A kernel's name without types, arguments and result: `void at::native::f<float, 4>(int)` is `at::native::f`."""
    name = kernel.removeprefix("void ")
    while (shorter := re.sub(r"<[^<>]*>", "", name)) != name:
        name = shorter
    return re.sub(r"\(anonymous namespace\)::", "", name).split("(")[0].strip()
