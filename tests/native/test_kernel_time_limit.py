"""GPUs that a display uses, whose driver ends kernels that run for some seconds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .programs import Programs

PROBE = """
import ctypes
from vllm_spark import _native
ctypes.CDLL("libcuda.so.1").cuda_hold(b"synchronize")  # it fails as after a kernel that was ended
try:
    _native.MachineProbe(b"image").round_trip(2, 0.001, 0)
except _native.CollectiveError as error:
    print(error)
"""


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


def test_a_probe_whose_kernel_is_ended_says_so(programs: Programs) -> None:
    """And not that the GPU did not answer, which follows from that."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "LD_LIBRARY_PATH": str(programs.libcuda())},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("the CUDA driver could not run a probe (CUDA_ERROR_LAUNCH_TIMEOUT)")
