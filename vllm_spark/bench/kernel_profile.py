"""Which kernels a decode step runs on this process's GPU, and how long each takes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec


class KernelTime(msgspec.Struct):
    """All kernels of one name; both figures are for one step."""

    name: str
    calls: float
    microseconds: float


class KernelProfile(msgspec.Struct):
    """The longest first."""

    kernels: list[KernelTime]

    @property
    def busy(self) -> float:
        """Microseconds of one step in which the GPU ran a kernel or copied, if none overlapped."""
        return sum(kernel.microseconds for kernel in self.kernels)


def profile_steps(run_step: Callable[[], bool], steps: int) -> KernelProfile | None:
    """Profiles `steps` calls of `run_step`; None if one of them ran no step and said so, or if there was no kernel.

    The profiler slows down the host, not kernels.
    """
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        complete = all(run_step() for _ in range(steps))
        torch.cuda.synchronize()
    profile = summary(profiler.key_averages(), steps)
    return profile if complete and profile.kernels else None


def summary(events: Any, steps: int) -> KernelProfile:
    """Events of torch's profiler (`key`, `count`, `self_device_time_total` in microseconds), by kernel, per step."""
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
