"""One tuner at a time on a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_spark.errors import SparkError
from vllm_spark.tune.timing import lock_gpu

HOLDER = """
import sys, time
from vllm_spark.tune.timing import lock_gpu
with lock_gpu(sys.argv[1]):
    print("claimed", flush=True)
    time.sleep(60)
"""


def test_a_claim_is_gone_with_its_process() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, "GPU-1"], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "claimed\n"
            with (
                pytest.raises(SparkError, match=r"another vllm-spark tune is running on this GPU \(GPU-1\)"),
                lock_gpu("GPU-1"),
            ):
                pass
            with lock_gpu("GPU-2"):
                pass
        finally:
            holder.kill()
    with lock_gpu("GPU-1"):
        pass
    with lock_gpu("GPU-1"):
        pass
