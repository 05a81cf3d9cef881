"""A pair's settings stay on vLLM's configuration, whatever vLLM does to it, and change no compile cache key."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest

from vllm_spark.config.attachment import add_to_compile_key, attach_settings, settings_of
from vllm_spark.config.settings import SECTION, SparkConfig
from vllm_spark.models.tiny import make_tiny_model

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import ModelConfig, VllmConfig
from vllm.config.utils import replace as vllm_replace

SETTINGS = SparkConfig.resolve(environment={}, file={"port": 4711, "heartbeat_timeout": 7.5})


Configure = Callable[..., VllmConfig]


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Configure:
    """Makes vLLM's configuration of a tiny model with settings in it."""
    model = ModelConfig(str(make_tiny_model(tmp_path_factory.mktemp("model"), "dense")))

    def make(settings: SparkConfig = SETTINGS) -> VllmConfig:
        config = VllmConfig(model_config=model, additional_config={"mine": 1, SECTION: {"version": "1"}})
        attach_settings(config, settings)
        return config

    return make


def with_settings(config: VllmConfig) -> VllmConfig:
    return vllm_replace(config, instance_id="another")


def through_another_process(config: VllmConfig) -> Any:
    """As vLLM's engine gets it: pickled by multiprocessing, then made anew there, and sent back."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(with_settings, (config,)).get(timeout=120)


COPIES: dict[str, Callable[[VllmConfig], Any]] = {
    "replace": with_settings,
    "dataclasses.replace": lambda config: dataclasses.replace(config, instance_id="another"),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)),
    "cloudpickle": lambda config: pickle.loads(cloudpickle.dumps(config)),
    "another process": through_another_process,
    "twice": lambda config: with_settings(copy.deepcopy(with_settings(config))),
}


@pytest.mark.parametrize("way", COPIES)
def test_settings_survive_every_copy(way: str, configured: Configure) -> None:
    copied = COPIES[way](configured())
    assert settings_of(copied) == SETTINGS
    assert copied.additional_config["mine"] == 1
    assert copied.compute_hash() == configured().compute_hash()


def test_a_configuration_for_a_part_of_the_model_has_the_settings(configured: Configure) -> None:
    """vLLM makes one with `with_hf_config` for the language model within a multimodal one."""
    config = configured()
    inner = config.with_hf_config(config.model_config.hf_config, architectures=["Qwen3ForCausalLM"])
    assert settings_of(inner) == SETTINGS


def test_what_changes_no_compiled_code_is_no_part_of_the_cache_key(configured: Configure) -> None:
    here = configured()
    assert configured(SparkConfig.resolve(environment={}, file={"port": 815})).compute_hash() == here.compute_hash()
    compiled = configured()
    add_to_compile_key(compiled, "atomic_add", "0123")
    assert compiled.compute_hash() != here.compute_hash()
    assert settings_of(compiled) == SETTINGS
    assert compiled.additional_config[SECTION]["version"] == "1"


def test_settings_show_in_no_description(configured: Configure) -> None:
    assert "4711" not in str(configured())
    assert "4711" not in repr(configured())


def test_a_configuration_without_settings_is_refused() -> None:
    with pytest.raises(Exception, match="started without settings"):
        settings_of(VllmConfig())
