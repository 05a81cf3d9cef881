"""Puts this machine's paths in place of names and of the leader's paths: every field that names files.

The leader does so before it sends its configuration, so that both ranks load from what was compared, and a name that
means another commit by then (or a load format `auto` that would find other files) changes nothing. The follower then
replaces the leader's paths by its own.

Fields that name what a worker writes (profiles, dumps of compiled code, caches) stay: they mean each machine's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_spark.executor.model_files.loaded import LoadedFiles, revision_text

_ANY_REVISION = "*"  # of what a path names
_NAME_FIELDS = ("_name_or_path", "name_or_path")
_NESTED = 3  # levels of Hugging Face configurations inside of each other: text, vision, decoder

_Places = Mapping[tuple[str, str], str]
"""By name and revision."""


def place_compared(vllm_config: Any, files: Sequence[LoadedFiles]) -> None:
    """Has the leader load from the places that it compares. Changes `vllm_config` in place.

    Args:
        vllm_config: as vLLM made it.
        files: all of `files_of(vllm_config)`.
    """
    places: dict[tuple[str, str], str] = {}
    for each in files:
        if each.origin != "object storage":  # both ranks read weights from there
            revision = _ANY_REVISION if each.origin == "path" else each.revision
            places.setdefault((each.name, revision), each.place)
    _place(vllm_config, places)
    _set_load_formats(vllm_config, {each.what: each.load_format for each in files if each.kind == "model"})


def place_files(vllm_config: Any, own: Mapping[str, Path]) -> None:
    """Has the follower load from its own places. Changes `vllm_config` in place.

    Args:
        vllm_config: the leader's, after `place_compared`.
        own: where this machine has what the leader has in that place.
    """
    _place(vllm_config, {(place, _ANY_REVISION): str(path) for place, path in own.items()})


def _place(vllm_config: Any, places: _Places) -> None:
    for model in _model_configs(vllm_config):
        revision = model.revision
        config_revision = getattr(model, "_hf_config_revision", None) or revision
        # The Hugging Face configurations first: they are named as the model is.
        for configuration in (model.hf_config, model.hf_text_config):
            _replace_names(configuration, places, revision, _NESTED)
        for field, its_revision in (
            ("model", revision),
            ("tokenizer", model.tokenizer_revision),
            ("hf_config_path", config_revision),
            ("generation_config", revision),
        ):
            _replace(model, field, places, its_revision)
        if isinstance(model.hf_overrides, dict):
            model.hf_overrides = {key: _own(value, places) for key, value in model.hf_overrides.items()}
        if model.multimodal_config is not None:
            _replace(model.multimodal_config, "mm_encoder_fp8_scale_path", places)
    if (speculative := vllm_config.speculative_config) is not None:
        draft = getattr(speculative, "draft_model_config", None)
        revision = getattr(speculative, "revision", None) if draft is None else draft.revision
        _replace(speculative, "model", places, revision)


def _set_load_formats(vllm_config: Any, formats: Mapping[str, str]) -> None:
    """Puts what the leader has resolved in place of the load format `auto`."""
    load_config, speculative = vllm_config.load_config, vllm_config.speculative_config
    draft_format = formats.get("draft model")
    if draft_format is not None and (draft_format != formats["model"] or speculative.draft_load_config is not None):
        speculative.draft_load_config = copy.copy(speculative.draft_load_config or load_config)
        speculative.draft_load_config.load_format = draft_format
    if load_config.load_format == "auto" and vllm_config.model_config.model_weights in (None, ""):
        load_config.load_format = formats["model"]


def _model_configs(vllm_config: Any) -> Iterator[Any]:
    """The target's and the draft's, each once: vLLM lets several fields share one."""
    speculative = vllm_config.speculative_config
    seen: list[Any] = []
    for model in (
        vllm_config.model_config,
        getattr(speculative, "target_model_config", None),
        getattr(speculative, "draft_model_config", None),
    ):
        if model is not None and all(model is not each for each in seen):
            seen.append(model)
            yield model


def _replace(config: Any, field: str, places: _Places, revision: Any = None) -> None:
    value = getattr(config, field, None)
    if (own := _own(value, places, revision)) is not value:
        setattr(config, field, own)


def _replace_names(configuration: Any, places: _Places, revision: Any, depth: int) -> None:
    """Names in Hugging Face's configurations, the inner ones included."""
    attributes = getattr(configuration, "__dict__", None)
    if attributes is None or depth < 0:
        return
    for field, value in list(attributes.items()):
        if field in _NAME_FIELDS:
            if (own := _own(value, places, revision)) is not value:
                setattr(configuration, field, own)
        elif hasattr(value, "to_dict"):
            _replace_names(value, places, revision, depth - 1)


def _own(value: Any, places: _Places, revision: Any = None) -> Any:
    if not isinstance(value, str):
        return value
    by_path = places.get((value, _ANY_REVISION), value)
    return places.get((value, revision_text(revision)), by_path)
