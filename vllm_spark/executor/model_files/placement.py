"""Puts this machine's paths in place of the leader's names into vLLM's configuration: every field that names files.

Both ranks do so, each with the places whose content was compared; so a rank that is online does not ask the hub again,
and may not load another commit than the other one. Fields that name what a worker writes (profiles, dumps of compiled
code, caches) stay: they mean each machine's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vllm_spark.executor.model_files.comparison import Kind
from vllm_spark.executor.model_files.loaded import FileKey, LoadedFiles

_MODEL_FIELDS = ("model", "hf_config_path", "generation_config")
_NAME_FIELDS = ("_name_or_path", "name_or_path")
_ANY: tuple[Kind, ...] = ("model", "tokenizer", "file")
_TOKENIZER: tuple[Kind, ...] = ("tokenizer", "model")  # a model's own tokenizer has no entry of its own
_NESTED = 3  # levels of Hugging Face configurations inside of each other: text, vision, decoder


def place_files(vllm_config: Any, own: Mapping[FileKey, Path], *, tokenizers: bool = True) -> None:
    """Changes `vllm_config` in place.

    Args:
        vllm_config: as the leader made it.
        own: where this machine has what the leader calls by that name and revision, or by that path.
        tokenizers: False leaves the tokenizers' names, for the leader where no worker reads one: its API server may
            still be downloading them, and its scheduler loads them by name.
    """
    for model in _model_configs(vllm_config):
        own_of_model = partial(_own, revision=model.revision, own=own)
        for field in _MODEL_FIELDS:
            _replace(model, field, own_of_model)
        if tokenizers:
            _replace(model, "tokenizer", partial(_own, revision=model.tokenizer_revision, own=own, kinds=_TOKENIZER))
        for configuration in (model.hf_config, model.hf_text_config):
            _replace_names(configuration, own_of_model, _NESTED)
        if isinstance(model.hf_overrides, dict):
            model.hf_overrides = {key: own_of_model(value) for key, value in model.hf_overrides.items()}
        if model.multimodal_config is not None:
            _replace(model.multimodal_config, "mm_encoder_fp8_scale_path", own_of_model)
    if (speculative := vllm_config.speculative_config) is not None:
        _replace(speculative, "model", partial(_own, revision=speculative.revision, own=own))


def place_on_leader(vllm_config: Any, files: Sequence[LoadedFiles]) -> None:
    """Has the leader's worker load from the places whose content the follower was compared with.

    Args:
        vllm_config: changed in place, so the follower must have it already: it looks for the names.
        files: what was offered.
    """
    tokenizers = any(each.with_tokenizer or (each.kind == "tokenizer" and each.required) for each in files)
    own = {key: Path(each.place) for each in files for key in each.file_keys()}
    place_files(vllm_config, own, tokenizers=tokenizers)


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


def _replace(config: Any, field: str, own: Callable[[Any], Any]) -> None:
    value = getattr(config, field, None)
    if (place := own(value)) is not value:
        setattr(config, field, place)


def _replace_names(configuration: Any, own: Callable[[Any], Any], depth: int) -> None:
    """Names in Hugging Face's configurations, the inner ones included."""
    attributes = getattr(configuration, "__dict__", None)
    if attributes is None or depth < 0:
        return
    for field, value in list(attributes.items()):
        if field in _NAME_FIELDS:
            _replace(configuration, field, own)
        elif hasattr(value, "to_dict"):
            _replace_names(value, own, depth - 1)


def _own(value: Any, *, revision: str | None, own: Mapping[FileKey, Path], kinds: tuple[Kind, ...] = _ANY) -> Any:
    """This machine's path; the value itself if it is something else. A path has no revision."""
    if not isinstance(value, str):
        return value
    revisions = (None if revision is None else str(revision), None)
    for kind in kinds:
        for each in revisions if os.path.isabs(value) else revisions[:1]:
            if (place := own.get((kind, value, each))) is not None:
                return str(place)
    return value
