"""One tuner at a time on a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_spark.errors import SparkError
from vllm_spark.tune.timing import claim

HOLDER = """
import sys, time
from vllm_spark.tune.timing import claim
with claim(sys.argv[1]):
    print("claimed", flush=True)
    time.sleep(60)
"""


def test_a_claim_is_gone_with_its_process() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, "GPU-1"], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "claimed\n"
            with (
                pytest.raises(SparkError, match=r"another vllm-spark tune is at work on this GPU \(GPU-1\)"),
                claim("GPU-1"),
            ):
                pass
            with claim("GPU-2"):
                pass
        finally:
            holder.kill()
    with claim("GPU-1"):
        pass
    with claim("GPU-1"):
        pass
