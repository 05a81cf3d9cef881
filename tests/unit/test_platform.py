"""This project's subclasses of vLLM's platforms."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import vllm.envs
from vllm.platforms.cpu import CpuPlatform
from vllm_spark.backend.platform import ONE_MACHINE_ALL_REDUCES, _cuda_platform

known = [name for name in ONE_MACHINE_ALL_REDUCES if name in vllm.envs.environment_variables]
print([getattr(vllm.envs, name) for name in known])
_cuda_platform(CpuPlatform)
print([getattr(vllm.envs, name) for name in known])
"""


def test_a_pair_on_gpus_has_no_all_reduces_of_one_machine() -> None:
    """They are on by default or by a variable: torch's symmetric memory then ended both ranks by SIGSEGV."""
    variables = {f"VLLM_ALLREDUCE_USE_{name}": "1" for name in ("SYMM_MEM", "FLASHINFER", "FLASHINFER_PCIE_IPC")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = (eval(line) for line in done.stdout.splitlines()[-2:])
    assert before
    assert all(before)
    assert not any(after)
