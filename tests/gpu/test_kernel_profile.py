"""What `vllm-spark bench decode --profile` times."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_spark.bench.kernel_profile import profile_steps


def call_workers(function: Callable[..., Any], args: tuple[Any, ...] = ()) -> list[Any]:
    """Of one rank, whose worker is in this process."""
    return [function(SimpleNamespace(rank=0), *args)]


def test_every_kernel_of_a_step_is_counted() -> None:
    numbers = torch.ones(1 << 20, device="cuda")

    def run_step() -> bool:
        numbers.add_(1.0)
        numbers.add_(1.0)
        return True

    profile = profile_steps(call_workers, run_step, 10)
    assert profile is not None
    (kernel,) = profile.kernels
    assert kernel.calls == 2
    assert 0 < kernel.microseconds == profile.busy


@pytest.mark.parametrize("whole", [0, 3])
def test_no_profile_of_less_than_was_asked_for(whole: int) -> None:
    numbers, done = torch.ones(1 << 20, device="cuda"), 0

    def run_step() -> bool:
        nonlocal done
        numbers.add_(1.0)
        done += 1
        return done <= whole

    assert profile_steps(call_workers, run_step, 4) is None
