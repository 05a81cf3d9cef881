"""Without `--spark`, an installed vllm_spark changes nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm_spark.processes.local import CPU_ENVIRONMENT
from vllm_spark.processes.managed import program

from . import shared_memory
from .conftest import OneRank
from .hosts import Host

LOOK = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.executor.abstract import Executor
config = EngineArgs(model=sys.argv[1], enforce_eager=True).create_engine_config()
print(json.dumps({
    "platform": type(current_platform).__module__,
    "communicator": current_platform.get_device_communicator_cls(),
    "executor": Executor.get_class(config).__module__,
    "ours": sorted(name for name in sys.modules if name.startswith("vllm_spark")),
    "additional_config": config.additional_config,
}))
"""


def test_stock_classes_are_in_use(host: Host, tiny_moe: Path) -> None:
    result = host.run([sys.executable, "-c", LOOK, str(tiny_moe)], timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["platform"] == "vllm.platforms.cpu"
    assert seen["communicator"].startswith("vllm.")
    assert seen["executor"].startswith("vllm.v1.executor.")
    assert seen["additional_config"] == {}
    assert "vllm_spark.compat.patching" in seen["ours"], "the plugin was loaded"
    assert "vllm_spark._native" not in seen["ours"]
    assert not [name for name in seen["ours"] if name.startswith(("vllm_spark.collective", "vllm_spark.executor"))]


def test_the_native_module_is_in_no_process(one_rank: OneRank) -> None:
    """The plugin is loaded in the server and in its engine, and what it needs for a pair is in neither."""
    assert len([maps for maps in one_rank.maps.values() if "libtorch" in maps]) >= 2, "server and engine"
    ours = ("vllm_spark/_native", shared_memory.REGION)
    assert [pid for pid, maps in one_rank.maps.items() if any(name in maps for name in ours)] == []


def test_vllms_errors_stay_vllms(host: Host, tiny_moe: Path) -> None:
    """An address of another machine: with `--spark` a sentence of ours, without it vLLM's own words."""
    argv = [program("vllm"), "serve", str(tiny_moe), "--host", "192.0.2.1", "--port", "1234"]
    result = host.run(argv, CPU_ENVIRONMENT, timeout=120)
    assert result.returncode == 1
    assert "Cannot assign requested address" in result.stderr
    assert "--spark" not in result.stdout + result.stderr
