"""`VLLM_MARLIN_INPUT_DTYPE=fp8` on a GB10, where output is wrong then: refused on both ranks, nowhere else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_spark.backend.support import check_marlin_inputs
from vllm_spark.errors import EXIT_USAGE, ConfigurationError
from vllm_spark.models.tiny import make_tiny_model
from vllm_spark.processes.local import CPU_ENVIRONMENT, free_ports
from vllm_spark.processes.managed import clean_environment

REASON = "corrupts output on a GB10 (compute capability 12.1, vLLM issue 49546); leave it unset"


def gpu_of(capability: tuple[int, int] | None) -> Callable[[], tuple[int, int] | None]:
    return lambda: capability


def test_a_gb10_and_fp8_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("fp8", "FP8"):
        monkeypatch.setenv("VLLM_MARLIN_INPUT_DTYPE", value)
        with pytest.raises(ConfigurationError) as refused:
            check_marlin_inputs(gpu_of((12, 1)))
        assert str(refused.value) == f"VLLM_MARLIN_INPUT_DTYPE is {value}, which {REASON}"
        assert refused.value.exit_code == EXIT_USAGE
        for other in ((12, 0), (8, 9), (9, 0), None):
            check_marlin_inputs(gpu_of(other))
    monkeypatch.setenv("VLLM_MARLIN_INPUT_DTYPE", "int8")
    check_marlin_inputs(gpu_of((12, 1)))
    monkeypatch.delenv("VLLM_MARLIN_INPUT_DTYPE")

    def asked() -> tuple[int, int]:
        raise AssertionError("a GPU is asked for nothing")

    check_marlin_inputs(asked)


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script in a process whose GPU, as far as vLLM can tell, is a GB10."""
    prelude = """
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
type(current_platform).get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(12, 1))
"""
    return subprocess.run(
        [sys.executable, "-c", prelude + script],
        env=clean_environment() | CPU_ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_leader_refuses(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, "dense")
    http, port = free_ports(2)
    serve = f"""
import sys
sys.argv = ["vllm", "serve", {str(model)!r}, "--spark", "--spark-address", "127.0.0.7"]
sys.argv += ["--spark-transport", "loopback", "--port", "{http}", "--spark-port", "{port}"]
from vllm.entrypoints.cli.main import main
main()
"""
    done = run(serve, VLLM_MARLIN_INPUT_DTYPE="fp8", XDG_CONFIG_HOME=str(tmp_path))
    assert done.returncode == EXIT_USAGE, done.stderr[-3000:]
    assert f"vllm serve --spark: VLLM_MARLIN_INPUT_DTYPE is fp8, which {REASON}." in done.stderr
    assert "Traceback" not in done.stderr


def test_the_follower_refuses() -> None:
    """Also where its own environment asks for it: the leader's variables are added to those."""
    follow = """
import pickle
from types import SimpleNamespace
from vllm_spark.config.settings import SparkConfig
from vllm_spark.executor.follower_session import FollowerSession
from vllm_spark.executor.bootstrap import Assignment
from vllm_spark.collective.launch_table import LaunchTable
assignment = Assignment(None, SparkConfig(), LaunchTable(), {})
calls = SimpleNamespace(expect=lambda *kinds, timeout: SimpleNamespace(payload=pickle.dumps(assignment)))
try:
    FollowerSession(SparkConfig(), print)._follow(calls, None, "127.0.0.1")
except Exception as error:
    print(type(error).__name__, error.exit_code, error)
"""
    done = run(follow, VLLM_MARLIN_INPUT_DTYPE="fp8")
    assert done.stdout.splitlines()[-1:] == [
        f"ConfigurationError {EXIT_USAGE} VLLM_MARLIN_INPUT_DTYPE is fp8, which {REASON}"
    ], done.stderr[-3000:]
