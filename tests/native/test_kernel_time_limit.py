"""GPUs that a display uses, whose driver ends kernels that run for some seconds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .programs import Programs


@pytest.mark.parametrize("display", [False, True])
def test_the_runtime_knows(programs: Programs, display: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from vllm_spark import _native; print(_native.DeviceRuntime.limits_kernel_time)"],
        env={**os.environ, "LD_LIBRARY_PATH": str(programs.libcuda()), **({"DISPLAY_ON_GPU": "1"} if display else {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"{display}\n"
