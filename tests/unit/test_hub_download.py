"""A model that is still on the hub: the leader downloads it as stock vLLM does, and its follower the same commit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub import COMMIT, Hub, cache_model, hub_of
from vllm_spark.models.tiny import make_tiny_model

pytest.importorskip("vllm", reason="vLLM is not installed")

LEADER = """
import dataclasses, json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm_spark.errors import SparkError
from vllm_spark.executor.model_files.loaded import files_of

config = EngineArgs(**json.loads(sys.argv[1])).create_engine_config()
try:
    print("RESULT", json.dumps({"files": [dataclasses.asdict(each) for each in files_of(config)]}))
except SparkError as error:
    print("RESULT", json.dumps({"refusal": str(error), "code": error.exit_code}))
"""

FOLLOWER = """
import json, sys
from vllm_spark.errors import SparkError
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.executor.model_files.own import find_own
from vllm_spark.records import from_json

try:
    found = [str(find_own(each)) for each in from_json(sys.argv[1], list[LoadedFiles])]
    print("RESULT", json.dumps({"places": found}))
except SparkError as error:
    print("RESULT", json.dumps({"refusal": str(error), "code": error.exit_code}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("hub"), "dense")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights, in a format that vLLM does not take")
    return folder


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with hub_of({"somebody/tiny": model}) as made:
        yield made


def run(script: str, argument: Any, home: Path, hub: Hub | None, **variables: str) -> dict[str, Any]:
    """Runs a script as a user with that home, who may use that hub; returns what it printed."""
    home.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
    environment |= {"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_ENDPOINT": hub.url}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(argument)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(results[-1].removeprefix("RESULT "))
    return result


def offer(model: str, home: Path, hub: Hub, **more: Any) -> Any:
    """What a leader with that home offers, which no other user sees from then on."""
    offered = run(LEADER, engine(model, **more), home, hub)["files"]
    home.rename(home.with_name("hidden"))
    return offered


def engine(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "max_model_len": 512, **more}


def test_both_sides_download_what_vllm_loads(hub: Hub, model: Path, tmp_path: Path) -> None:
    offered = offer("somebody/tiny", tmp_path / "alice", hub)
    assert [each["what"] for each in offered] == ["model"]
    assert offered[0]["hub"] == {"repository": "somebody/tiny", "commit": COMMIT, "inside": ""}
    assert offered[0]["identity"]["weights"].keys() == {"model.safetensors"}
    assert "somebody/tiny/model.safetensors" in hub.downloads
    hub.downloads.clear()
    (place,) = run(FOLLOWER, offered, tmp_path / "bob", hub)["places"]
    assert place == str(tmp_path / "bob/hf/hub/models--somebody--tiny/snapshots" / COMMIT)
    assert (Path(place) / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert (Path(place) / "tokenizer.json").exists()
    assert "somebody/tiny/pytorch_model.bin" not in hub.downloads


@pytest.mark.thorough
def test_a_follower_that_is_offline_is_told_what_to_type(hub: Hub, tmp_path: Path) -> None:
    offered = offer("somebody/tiny", tmp_path / "alice", hub)
    result = run(FOLLOWER, offered, tmp_path / "bob", None)
    host = os.uname().nodename
    assert result["refusal"] == (
        f"the model somebody/tiny, commit {COMMIT}, is not on {host}; "
        f"download it on {host}: hf download somebody/tiny --revision {COMMIT}"
    )
    assert result["code"] == 3


@pytest.mark.thorough
def test_a_model_that_came_in_part_is_completed(hub: Hub, model: Path, tmp_path: Path) -> None:
    """An interrupted download leaves some files of a snapshot."""
    offered = offer("somebody/tiny", tmp_path / "alice", hub)
    snapshot = cache_model(model, tmp_path / "bob/hf/hub", "somebody/tiny")
    (snapshot / "model.safetensors").unlink()
    assert run(FOLLOWER, offered, tmp_path / "bob", hub)["places"] == [str(snapshot)]
    assert (snapshot / "model.safetensors").exists()


@pytest.mark.thorough
def test_weights_may_have_a_folder_of_their_own(hub: Hub, tmp_path: Path) -> None:
    """`--download-dir` is for weights; the configuration goes to the user's cache."""
    folder = tmp_path / "weights"
    offered = offer("somebody/tiny", tmp_path / "alice", hub, download_dir=str(folder))
    assert offered[0]["place"] == str(folder / "models--somebody--tiny/snapshots" / COMMIT)
    assert {"config.json", "model.safetensors"} <= set(os.listdir(offered[0]["place"]))
    assert offered[0]["identity"]["configuration"].keys() == {"config.json"}


@pytest.mark.thorough
def test_a_model_that_the_leader_cannot_download(model: Path, tmp_path: Path) -> None:
    """Its configuration comes, so that vLLM begins; its weights are nowhere."""
    empty = tmp_path / "empty"
    shutil.copytree(model, empty, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    with hub_of({"somebody/empty": empty}) as hub:
        result = run(LEADER, engine("somebody/empty"), tmp_path / "alice", hub)
    host = os.uname().nodename
    assert result["refusal"].startswith(f"the model somebody/empty is not on {host} (Cannot find any model weights")
    assert result["refusal"].endswith(f"; download it on {host}: hf download somebody/empty")
    assert ".." not in result["refusal"]
    assert result["code"] == 3
