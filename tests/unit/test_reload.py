"""Weights that are loaded while the pair serves: what the leader compares, and what the follower loads from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from vllm_spark.errors import RefusedError, SparkError
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.model_files.compared import ComparedFiles
from vllm_spark.models.tiny import make_tiny_model

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.engine.arg_utils import EngineArgs

from vllm_spark.executor.model_files.loaded import weights_to_reload


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "model", "dense")


def config_of(model: Path, **more: Any) -> Any:
    return EngineArgs(model=str(model), max_model_len=512, **more).create_engine_config()


def test_the_engines_own_weights_are_as_they_are_now(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "model"
    shutil.copytree(model, own)
    config = config_of(own)
    before = weights_to_reload(config, None)
    make_tiny_model(own, "dense", seed=1)
    after = weights_to_reload(config, None)
    assert before.place == after.place == str(own)
    assert before.identity.weights != after.identity.weights


def test_a_path_is_that_of_this_call_alone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether vLLM goes on with it is its worker's matter."""
    make_tiny_model(tmp_path / "other", "dense", seed=1)
    config = config_of(model)
    monkeypatch.chdir(tmp_path)
    assert weights_to_reload(config, "./other").place == str(tmp_path / "other")
    assert weights_to_reload(config, None).place == str(model)


def test_a_folder_without_weights(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"^there is no model in .*; copy it there from the other machine$"):
        weights_to_reload(config_of(model), str(tmp_path / "none"))
    with pytest.raises(RefusedError, match=r"^there are no weight files in "):
        weights_to_reload(config_of(model), str(tmp_path))


def test_a_loader_that_cannot(model: Path) -> None:
    with pytest.raises(
        RefusedError, match=r"^--load-format dummy is invalid for reload_weights: must be one that reads all weights of"
    ):
        weights_to_reload(config_of(model, load_format="dummy"), None)


def test_the_follower_loads_what_was_compared(model: Path, tmp_path: Path) -> None:
    """From its own folder, and only while that has the same content."""
    own = tmp_path / "own"
    shutil.copytree(model, own)
    compared = ComparedFiles(lambda wanted: own)
    wanted = weights_to_reload(config_of(model), None)
    assert compared.compare(wanted) is None
    assert compared.place(wanted.place, "model") == own
    compared.verify(wanted.place)
    make_tiny_model(own, "dense", seed=1)
    with pytest.raises(
        SparkError,
        match=rf"^the model was changed while the pair serves: the weight file model.safetensors has other content on "
        rf"{host_name()} \({own}\); load what has changed from a new folder",
    ):
        compared.verify(wanted.place)


def test_what_was_not_compared_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(SparkError, match=r"^the model was not compared before it is loaded; report this$"):
        ComparedFiles().place(str(tmp_path), "model")
