"""Puts this machine's paths in place of the leader's into vLLM's configuration: every field that names files.

Fields that name what a worker writes (profiles, dumps of compiled code, caches) stay: they mean each machine's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_MODEL_FIELDS = ("model", "tokenizer", "hf_config_path", "generation_config")
_NAME_FIELDS = ("_name_or_path", "name_or_path")
_NESTED = 3  # levels of Hugging Face configurations inside of each other: text, vision, decoder


def place_files(vllm_config: Any, own: Mapping[str, Path]) -> None:
    """Changes `vllm_config` in place.

    Args:
        vllm_config: as the leader made it.
        own: where this machine has what the leader calls by that name or path.
    """
    places = {name: str(path) for name, path in own.items()}
    for model in _model_configs(vllm_config):
        _replace(model, _MODEL_FIELDS, places)
        for configuration in (model.hf_config, model.hf_text_config):
            _replace_names(configuration, places, _NESTED)
        if isinstance(model.hf_overrides, dict):
            model.hf_overrides = {key: _own(value, places) for key, value in model.hf_overrides.items()}
        if model.multimodal_config is not None:
            _replace(model.multimodal_config, ("mm_encoder_fp8_scale_path",), places)
    if vllm_config.speculative_config is not None:
        _replace(vllm_config.speculative_config, ("model",), places)


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


def _replace(config: Any, fields: tuple[str, ...], places: Mapping[str, str]) -> None:
    for field in fields:
        value = getattr(config, field, None)
        if (own := _own(value, places)) is not value:
            setattr(config, field, own)


def _replace_names(configuration: Any, places: Mapping[str, str], depth: int) -> None:
    """Names in Hugging Face's configurations, the inner ones included."""
    attributes = getattr(configuration, "__dict__", None)
    if attributes is None or depth < 0:
        return
    for field, value in list(attributes.items()):
        if field in _NAME_FIELDS:
            if (own := _own(value, places)) is not value:
                setattr(configuration, field, own)
        elif hasattr(value, "to_dict"):
            _replace_names(value, places, depth - 1)


def _own(value: Any, places: Mapping[str, str]) -> Any:
    return places.get(value, value) if isinstance(value, str) else value
