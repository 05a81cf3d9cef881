"""What is made of vLLM's real engine arguments: by an engine's first process, by another API server, and again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_spark.models.tiny import make_tiny_model

pytest.importorskip("vllm", reason="vLLM is not installed")

PROGRAM = """
import json, os, socket, sys
from prometheus_client import REGISTRY
from vllm.engine.arg_utils import EngineArgs
from vllm_spark.backend.status import EngineStatus, RankCounters, engine_ended_on_request, engine_failure
from vllm_spark.errors import ConfigurationError, PeerLostError
from vllm_spark.compat.patching import ANNOUNCED
from vllm_spark.config.attachment import settings_of

taken = socket.create_server(("127.0.0.1", 0))
port = taken.getsockname()[1]
given = {"spark": {"address": "127.0.0.1", "port": port, "heartbeat_timeout": 7.0}}
args = EngineArgs(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=1024, additional_config=given)
NAMES = ("tensor_parallel_size", "distributed_executor_backend", "disable_custom_all_reduce")
before = [getattr(args, name) for name in NAMES]
found = {}

def create(name):
    try:
        config = args.create_engine_config()
    except ConfigurationError as error:
        found[name] = str(error)
        return
    parallel = config.parallel_config
    found[name] = [settings_of(config).port == port, settings_of(config).heartbeat_timeout]
    found[name] += [parallel.tensor_parallel_size, parallel.distributed_executor_backend]

def unchanged():
    return args.additional_config is given and list(given["spark"]) == ["address", "port", "heartbeat_timeout"] \\
        and [getattr(args, name) for name in NAMES] == before

def steps():
    return REGISTRY.get_sample_value("vllm_spark_steps_total", {"rank": "0"})

create("taken")
found["unchanged by an error"] = unchanged()
taken.close()
create("free")
found["unchanged"] = unchanged()
first, announced = EngineStatus.from_environment(), os.environ[ANNOUNCED]
first.write(RankCounters(0, steps=5))
found["steps of the first"] = steps()
first.fail(PeerLostError("the follower left"))
first.mark_ended(clean=True)
found["of the first"] = [str(engine_failure()), engine_ended_on_request()]
with socket.create_server(("127.0.0.1", port)):  # by now its engine listens there
    args._api_process_count, args._api_process_rank = 2, 1
    create("another API server")
found["its board is the engine's"] = os.environ[ANNOUNCED] == announced and steps() == 5
args._api_process_count, args._api_process_rank = 1, 0
create("second")
found["of the second"] = [engine_failure(), engine_ended_on_request(), steps()]
first.mark_ended(clean=True)  # late, as it is when Python collects it
first.write(RankCounters(0, steps=6))
found["of the second, later"] = [engine_failure(), engine_ended_on_request(), steps()]
del first
found["boards"] = sum("vllm-spark-counters" in os.readlink(f"/proc/self/fd/{name}")
                      for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}"))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model: Path = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "moe")
    argv = [sys.executable, "-c", PROGRAM, str(model)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


MADE = [True, 7.0, 2, "vllm_spark.executor.SparkExecutor"]


def test_engine_arguments_can_be_used_again(found: dict[str, Any]) -> None:
    """Also after an error: the settings in them are still there, and nothing else is."""
    assert found["taken"].startswith("cannot listen on 127.0.0.1:")
    assert found["unchanged by an error"]
    assert found["free"] == MADE
    assert found["unchanged"]
    assert found["second"] == MADE


def test_another_api_server_shares_what_the_first_process_made(found: dict[str, Any]) -> None:
    """It neither looks at the port, which the engine has by then, nor announces a board, which no engine would find."""
    assert found["another API server"] == MADE
    assert found["its board is the engine's"]


def test_what_an_engine_leaves_is_not_the_next_ones(found: dict[str, Any]) -> None:
    assert found["steps of the first"] == 5
    assert found["of the first"] == ["the follower left", True]
    assert found["of the second"] == [None, False, None]
    assert found["of the second, later"] == [None, False, None]
    assert found["boards"] == 2, "the descriptor of the last one, and that of its mapping"
