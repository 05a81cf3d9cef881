"""All that is said of a model before it is served: from its config.json here, and by each machine of its files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from vllm_spark.backend.support import check_marlin_inputs
from vllm_spark.compat.versions import default_memory_share, is_cpu_build
from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor.finding import Finding, guarded
from vllm_spark.doctor.model.files import place_of, weights_of
from vllm_spark.doctor.model.question import ModelQuestion
from vllm_spark.doctor.rdma import pinned_bytes
from vllm_spark.errors import ConfigurationError, upper_first
from vllm_spark.estimate.model import read_model
from vllm_spark.executor.handshake.messages import Sought
from vllm_spark.executor.model_files.hub_cache import is_path
from vllm_spark.executor.model_sync.fetch_from_follower import find_named
from vllm_spark.files import configs_folder
from vllm_spark.memory.need import MemoryNeed, graphs_and_activations
from vllm_spark.model_check.division import check_division, layers_of
from vllm_spark.model_check.speed import check_speed
from vllm_spark.model_check.tables import check_tables
from vllm_spark.models.config import read_model_config
from vllm_spark.models.config_values import names, whole_number
from vllm_spark.models.text_model import TextModel
from vllm_spark.ranks import WORLD_SIZE

_GB10_CAPABILITY = (12, 1)
_KV_BYTES = 2.0  # bfloat16


class ModelExamination(NamedTuple):
    """What is known of a model without its weights."""

    question: ModelQuestion | None
    """For each machine; None if there is no config.json that can be read."""
    findings: list[Finding]
    """What holds for both machines."""


def examine(model: str, config: SparkConfig) -> ModelExamination:
    """Reads a model's config.json and checks it; nothing is downloaded, and nothing raised for what is found.

    Args:
        model: a folder, a name on the hub (from this user's cache), or one in `configs/models`.
        config: the settings of this machine.
    """
    name = os.path.abspath(os.path.expanduser(model)) if is_path(model) or os.path.exists(model) else model
    try:
        _, content = read_model_config(name, cached_only=True)
    except ConfigurationError as error:
        return ModelExamination(None, [_unreadable(name, error)])
    findings: list[Finding] = []
    for area, check in (
        ("model.config", lambda: [_described(content)]),
        ("model.division", lambda: check_division(name, content)),
        ("model.speed", lambda: _with_layers(name, content)),
        ("model.inputs", _inputs),
    ):
        findings += guarded(area, check)
    return ModelExamination(_question(name, content, config), findings)


def with_files(question: ModelQuestion, config: SparkConfig) -> ModelQuestion:
    """The question for the other machine: with what this one has of the model, whose files are read for it."""
    if not question.has_files:
        return question
    files = find_named(Sought("model", question.name, "model", None), config.mapped_folders)
    return replace(question, files=files, sends_files=config.model_sync != "off")


def _unreadable(name: str, error: ConfigurationError) -> Finding:
    sentence, _, remedy = str(error).partition("; ")
    command = remedy if remedy.startswith("hf ") else f"vllm-spark doctor MODEL   # {remedy}" if remedy else ""
    return Finding(
        "model.config",
        "Model",
        "problem",
        name,
        f"{upper_first(sentence)}. Without it nothing can be said of the model; the doctor downloads nothing.",
        command or f"ls -l {name}",
    )


def _described(config: Mapping[str, Any]) -> Finding:
    kinds = names(config, "architectures") or [str(config.get("model_type", "of an unnamed kind"))]
    layers = whole_number(TextModel(config, 1).config, "num_hidden_layers")
    return Finding("model.config", "Model", "ok", f"{kinds[0]}" + (f", {layers} layers" if layers else ""))


def _with_layers(name: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    """The findings that need the model's layers."""
    try:
        layers = layers_of(config)
    except ConfigurationError:
        return  # the finding about the division has the reason
    if layers is None:
        yield Finding(
            "model.speed",
            "Predicted on a pair of GB10",
            "unknown",
            str(TextModel(config, 1).type or "no model_type"),
            "The layers of this kind of model are not known here, so neither its speed, nor its memory without its "
            "weight files, nor its tables can be computed. It may be served all the same.",
        )
        return
    yield from check_speed(name, config)
    yield check_tables(name, layers)


def _inputs() -> Iterator[Finding]:
    """The finding that a variable makes Marlin's results wrong on a GB10; none if it is not set."""
    try:
        check_marlin_inputs(lambda: _GB10_CAPABILITY)
    except ConfigurationError as error:
        sentence, _, _ = str(error).partition("; ")
        yield Finding(
            "model.inputs",
            "Inputs of Marlin's kernels",
            "problem",
            f"VLLM_MARLIN_INPUT_DTYPE={os.environ['VLLM_MARLIN_INPUT_DTYPE']}",
            f"{upper_first(sentence)}.",
            "unset VLLM_MARLIN_INPUT_DTYPE",
        )


def _question(name: str, content: Mapping[str, Any], config: SparkConfig) -> ModelQuestion:
    shipped = not is_path(name) and (configs_folder() / "models" / name).is_dir()
    place = None if shipped else place_of(name, config)
    weights = sum(path.stat().st_size for path in weights_of(place)) // WORLD_SIZE if place is not None else 0
    token = 0
    try:
        half = read_model(content, WORLD_SIZE)
    except ConfigurationError:
        pass
    else:
        weights = weights or int(half.weight_bytes)
        token = int(sum(each.count * each.token_values * _KV_BYTES for each in half.memories if each.window is None))
    try:
        longest = whole_number(TextModel(content, 1).config, "max_position_embeddings") or 0
    except ConfigurationError:
        longest = 0
    need = MemoryNeed(
        weights=weights,
        graphs=graphs_and_activations(gpu=not is_cpu_build()),
        region=_region(config),
        utilization=default_memory_share(),
    )
    return ModelQuestion(name, need, token, longest, has_files=not shipped)


def _region(config: SparkConfig) -> int:
    try:
        return pinned_bytes(config, 1)
    except ImportError:  # the finding about the kernels says that the native module is missing
        return 0
