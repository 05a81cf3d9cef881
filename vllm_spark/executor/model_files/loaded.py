"""What an engine loads from files: which it is, whatever it is called, and where the leader has it."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from vllm_spark.compat.versions import installed_vllm
from vllm_spark.errors import RefusedError, first_line
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.model_files import hub_cache
from vllm_spark.executor.model_files.comparison import Kind, ModelIdentity, unreadable
from vllm_spark.executor.model_files.hub_cache import HubPlace, cached_snapshot, hub_place_of
from vllm_spark.executor.model_files.weights import CONSOLIDATED, FILE_FORMATS, missing_weights

Origin = Literal["path", "hub", "modelscope", "object storage"]
"""Where a name leads: to this machine's files, or to a place that every machine can ask."""

FileKey = tuple[Kind, str, str | None]
"""What is read, its name and its revision as vLLM's configuration has them; or its absolute path and None."""

MODEL, DRAFT = "model", "draft model"
_AUTO = "auto"
BESIDE_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
"""Small files of a model that a worker may read too: tokenizer, processor, code."""


@dataclasses.dataclass(frozen=True)
class LoadedFiles:
    """A model, a tokenizer, an adapter or a file that both ranks load, as the leader has it.

    Attributes:
        what: how messages call it, such as "draft model".
        name: what vLLM's configuration (or a request) calls it: a name of a hub, a path of the leader's, or a URL.
        place: where the leader has it, absolute.
        kind: what it is.
        identity: what is in it.
        origin: where `name` leads.
        hub: what it is on the Hugging Face hub; None if that is not known.
        with_weights: whether weights are loaded from there.
        with_code: whether Python files in it may be executed.
        with_tokenizer: whether a worker reads a tokenizer and a processor there too.
        required: whether the follower must have it.
        revision: of `name`, as the configuration has it.
        load_format: how vLLM loads the weights, with `auto` resolved.
        single_file: whether `place` is a file.
    """

    what: str
    name: str
    place: str
    kind: Kind
    identity: ModelIdentity
    origin: Origin = "path"
    hub: HubPlace | None = None
    with_weights: bool = True
    with_code: bool = False
    with_tokenizer: bool = False
    required: bool = True
    revision: str | None = None
    load_format: str = "hf"
    single_file: bool = False

    def file_keys(self) -> list[FileKey]:
        """What fields of vLLM's configuration call it. A URL is not among them: both ranks read weights from there."""
        place: FileKey = (self.kind, self.place, None)
        return [place] if self.origin == "object storage" else [place, (self.kind, self.name, self.revision)]

    def weight_paths(self, place: Path) -> list[Path]:
        """The files with its weights in `place`, which has the same content; empty if none are read from there."""
        if not self.with_weights:
            return []
        return [place] if self.single_file else [place / name for name in self.identity.weights]

    def identity_at(self, place: Path, *, with_weights: bool | None = None) -> ModelIdentity:
        """What is in another place, read as `identity` was.

        Raises:
            RefusedError: it cannot be read.
        """
        return ModelIdentity.of(
            place,
            with_weights=self.with_weights if with_weights is None else with_weights,
            kind=self.kind,
            with_code=self.with_code,
            with_tokenizer=self.with_tokenizer,
            load_format=self.load_format,
        )


def files_of(vllm_config: Any) -> list[LoadedFiles]:
    """All that the workers of an engine will load from files. What is still on a hub is downloaded, as vLLM would.

    Raises:
        RefusedError: something is not there, cannot be read or downloaded, or has no weights.
    """
    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    two_vocabularies = bool(getattr(speculative, "use_heterogeneous_vocab", False))
    models = [(MODEL, model, vllm_config.load_config, two_vocabularies or model.is_multimodal_model)]
    draft = getattr(speculative, "draft_model_config", None)
    if draft is not None and not _is_same_model(draft, model):
        load_config = getattr(speculative, "draft_load_config", None) or vllm_config.load_config
        models.append((DRAFT, draft, load_config, two_vocabularies))
    found: list[LoadedFiles] = []
    for what, each, load_config, reads_tokenizer in models:
        own_tokenizer = _has_own_tokenizer(each)
        found.append(_model_files(what, each, load_config, with_tokenizer=reads_tokenizer and own_tokenizer))
        if not own_tokenizer:
            found += _tokenizer_files(f"{what}'s tokenizer", each, required=reads_tokenizer)
    found += [_one_file(what, path) for what, path in _single_files(vllm_config)]
    unique: dict[tuple[str, ...], LoadedFiles] = {}
    for files in found:
        # A draft model has its target's tokenizer.
        unique.setdefault((files.kind, files.place, files.name, files.revision or ""), files)
    return list(unique.values())


def weight_paths(files: Iterable[LoadedFiles], own: Mapping[FileKey, Path] | None = None) -> list[Path]:
    """The weight files that a rank loads.

    Args:
        files: as the leader has them.
        own: where this machine has them; None on the leader.
    """
    found: list[Path] = []
    for each in files:
        if each.kind == "model":
            place = Path(each.place) if own is None else own.get(each.file_keys()[0])
            found += each.weight_paths(place) if place is not None else []
    return found


def weights_to_reload(vllm_config: Any, weights_path: str | None) -> LoadedFiles:
    """The weights that the workers of a running engine are about to read.

    Args:
        vllm_config: of the engine.
        weights_path: the model that has them, a path or a name of a hub; None if it is the engine's own.

    Raises:
        RefusedError: as `files_of`, or vLLM's loader of the engine's format cannot load into a model that has weights.
    """
    from vllm.model_executor.model_loader import get_model_loader

    if not hasattr(get_model_loader(vllm_config.load_config), "get_all_weights"):
        raise RefusedError(
            f"--load-format {load_format_of(vllm_config.load_config)} is invalid for reload_weights: must be one that "
            "reads all weights of a model, such as auto; call update_config with another one first"
        )
    model = copy.copy(vllm_config.model_config)
    if weights_path is not None:
        model.model, model.revision, model.model_weights = weights_path, None, ""
    return _model_files(MODEL, model, vllm_config.load_config, with_tokenizer=False)


def pin_load_formats(vllm_config: Any, files: Iterable[LoadedFiles]) -> None:
    """Puts what `auto` stands for on the leader into its configuration, which the follower gets.

    Otherwise each rank would look for itself, the follower into a folder that may hold the weights in both formats.
    """
    formats = {each.what: each.load_format for each in files if each.with_weights and each.kind == "model"}
    target = vllm_config.load_config
    speculative = vllm_config.speculative_config
    if MODEL in formats and load_format_of(target) == _AUTO:
        if speculative is not None and getattr(speculative, "draft_load_config", None) is None and DRAFT in formats:
            speculative.draft_load_config = dataclasses.replace(target)
        target.load_format = formats[MODEL]
    draft = getattr(speculative, "draft_load_config", None)
    if draft is not None and load_format_of(draft) == _AUTO and (resolved := formats.get(DRAFT, formats.get(MODEL))):
        draft.load_format = resolved


def load_format_of(load_config: Any) -> str:
    """The load format of a configuration of vLLM's, which may have an enumeration there."""
    return str(getattr(load_config.load_format, "value", load_config.load_format))


def _resolved(model: Any, load_config: Any) -> str:
    """What `auto` stands for: vLLM's default loader asks the hub, or looks into a folder, in the same way."""
    load_format = load_format_of(load_config)
    if load_format != _AUTO or model.model_weights:
        return load_format
    from vllm.transformers_utils.repo_utils import list_filtered_repo_files

    consolidated = list_filtered_repo_files(str(model.model), [CONSOLIDATED], model.revision)
    return "mistral" if consolidated else "hf"


def _is_same_model(draft: Any, model: Any) -> bool:
    if draft.model == model.model_weights:
        return True
    return bool(draft.model == model.model and (draft.revision == model.revision or os.path.exists(model.model)))


def _has_own_tokenizer(model: Any) -> bool:
    """Whether its tokenizer is in its own folder."""
    if model.skip_tokenizer_init or model.tokenizer != model.model:
        return False
    return bool(model.tokenizer_revision == model.revision or os.path.exists(model.model))


def adapter_files(name: str, path: str, place: Path) -> LoadedFiles:
    """An adapter that is about to be loaded.

    Args:
        name: of the adapter.
        path: what the request calls it: a path, or a name of the hub.
        place: where the leader has it.

    Raises:
        RefusedError: it cannot be read.
    """
    identity = ModelIdentity.of(place, kind="adapter")
    hub = hub_place_of(place)
    origin: Origin = "hub" if hub is not None and not os.path.isabs(os.path.expanduser(path)) else "path"
    return LoadedFiles(f"adapter {name}", path, str(place), "adapter", identity, origin, hub)


def _model_files(what: str, model: Any, load_config: Any, *, with_tokenizer: bool) -> LoadedFiles:
    load_format = _resolved(model, load_config)
    with_code = bool(model.trust_remote_code)
    read = partial(ModelIdentity.of, with_code=with_code, with_tokenizer=with_tokenizer, load_format=load_format)
    files = partial(
        LoadedFiles,
        what,
        kind="model",
        with_code=with_code,
        with_tokenizer=with_tokenizer,
        load_format=load_format,
        revision=_text(model.revision),
    )
    if model.model_weights:
        # The configuration was copied from object storage into a folder of this user; weights are streamed.
        place, url = Path(model.model), str(model.model_weights)
        identity = read(place, with_weights=False)
        return files(name=url, place=str(place), identity=identity, origin="object storage", with_weights=False)
    with_weights = load_format != "dummy"
    place, origin = _find(what, model, load_config, load_format)
    if load_format in FILE_FORMATS and os.path.isfile(place):
        raise RefusedError(
            f"the {what} {model.model} is a single file, from which vLLM {installed_vllm()} loads no weights in the "
            f"format {load_format_of(load_config)}; give a folder in Hugging Face format"
        )
    identity = read(place, with_weights=with_weights)
    if load_format in FILE_FORMATS and not identity.weights:
        raise RefusedError(
            f"there are no weight files in {place}, and both sides compare them before they load any; "
            f"copy or download the whole {what} there first"
        )
    if with_code and origin != "path" and model.code_revision not in (None, model.revision):
        raise RefusedError(
            f"--code-revision {model.code_revision} of the {what} {model.model} is not supported: both ranks run the "
            "code in the folder with its weights, which is compared; leave the option out"
        )
    hub = None if origin == "modelscope" else hub_place_of(place)
    name = str(model.model)
    return files(
        name=name,
        place=str(place),
        identity=identity,
        origin=origin,
        hub=hub,
        with_weights=with_weights,
        single_file=os.path.isfile(place),
    )


def _text(revision: str | None) -> str | None:
    """A revision without what vLLM may have attached to it."""
    return None if revision is None else str(revision)


def _find(what: str, model: Any, load_config: Any, load_format: str) -> tuple[Path, Origin]:
    """Where the leader has a model; downloads it if need be and if it may.

    Its weights must be there too if vLLM reads them from files. (It does not for dummy weights, say.)
    """
    complete = load_format in FILE_FORMATS
    name = str(model.model)
    if (path := existing_path(what, name)) is not None:
        return path, "path"
    if uses_modelscope():
        return _from_modelscope(what, model, load_config, complete), "modelscope"
    cache = load_config.download_dir if complete else None
    place = cached_snapshot(name, model.revision, cache)
    if place is None or (complete and not _is_complete(place, load_format)):
        _download(what, model, load_config)
        place = cached_snapshot(name, model.revision, cache)
        if place is None:
            raise RefusedError(_not_here(what, name, model.revision, "its download left nothing in the cache"))
    hub = hub_place_of(place)
    if cache is not None and hub is not None and not os.path.exists(place / "config.json"):
        # vLLM keeps the configuration in its user's cache, and the weights here.
        try:
            hub_cache.download(hub, BESIDE_WEIGHTS, cache)
        except Exception as error:
            raise RefusedError(_not_here(what, name, model.revision, first_line(error))) from error
    return place, "hub"


def _is_complete(place: Path, load_format: str) -> bool:
    weights = ModelIdentity.of(place, load_format=load_format).weights
    return bool(weights) and not missing_weights(place, load_format)


def _download(what: str, model: Any, load_config: Any) -> None:
    """Has vLLM's own loader download a model, so that the same files come as without a pair."""
    from vllm.model_executor.model_loader import get_model_loader

    if not hub_cache.may_download():
        raise RefusedError(_not_here(what, model.model, model.revision, "HF_HUB_OFFLINE is set"))
    try:
        get_model_loader(load_config).download_model(model)
    except Exception as error:
        raise RefusedError(_not_here(what, model.model, model.revision, first_line(error))) from error


def _not_here(what: str, name: str, revision: str | None, reason: str) -> str:
    command = f"modelscope download --model {name}" if uses_modelscope() else f"hf download {name}"
    if revision not in (None, "main"):
        command += f" --revision {revision}"
    host = host_name()
    return f"the {what} {name} is not on {host} ({reason}); download it on {host}: {command}"


def _from_modelscope(what: str, model: Any, load_config: Any, complete: bool) -> Path:
    if complete:
        _download(what, model, load_config)
    try:
        from modelscope.hub.snapshot_download import snapshot_download

        return Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))
    except Exception as error:
        raise RefusedError(_not_here(what, model.model, model.revision, first_line(error))) from error


def _tokenizer_files(what: str, model: Any, *, required: bool) -> Iterator[LoadedFiles]:
    """A tokenizer of its own. Only some engines' workers need it; others' is found if it can be."""
    name = str(model.tokenizer)
    if model.skip_tokenizer_init:
        return
    try:
        place = existing_path(what, name) or cached_snapshot(name, model.tokenizer_revision)
    except RefusedError:
        if required:
            raise
        return
    if place is not None and os.path.isdir(place):
        identity = ModelIdentity.of(place, kind="tokenizer")
        origin: Origin = "path" if str(place) == os.path.abspath(os.path.expanduser(name)) else "hub"
        hub, revision = hub_place_of(place), _text(model.tokenizer_revision)
        yield LoadedFiles(
            what, name, str(place), "tokenizer", identity, origin, hub, required=required, revision=revision
        )


def _single_files(vllm_config: Any) -> Iterator[tuple[str, str]]:
    multimodal = vllm_config.model_config.multimodal_config
    if path := getattr(multimodal, "mm_encoder_fp8_scale_path", None):
        yield "file of --mm-encoder-fp8-scale-path", path
    overrides = vllm_config.model_config.hf_overrides
    if isinstance(overrides, dict) and isinstance(path := overrides.get("quantization_config_file"), str):
        yield "quantization_config_file of --hf-overrides", path


def _one_file(what: str, path: str) -> LoadedFiles:
    place = Path(os.path.abspath(os.path.expanduser(path)))
    identity = ModelIdentity.of(place, kind="file")
    return LoadedFiles(what, path, str(place), "file", identity, hub=hub_place_of(place), single_file=True)


def existing_path(what: str, name: str) -> Path | None:
    """The folder or file that `name` is on this machine; None if it is a name of a hub.

    Raises:
        RefusedError: it is a path, and nothing is there or this user may not look.
    """
    path = Path(os.path.expanduser(name))  # leaves a user who does not exist
    is_path = path.is_absolute() or name.startswith((".", "~"))
    try:
        if path.is_dir() or path.is_file():
            return Path(os.path.abspath(path))
        path.stat()
    except PermissionError as error:
        if is_path:
            raise RefusedError(unreadable(path, error)) from None
    except OSError:
        pass
    if is_path:
        raise RefusedError(f"there is no {what} in {name} on {host_name()}; copy it there from the other machine")
    return None


def uses_modelscope() -> bool:
    """Whether names lead to ModelScope in place of the Hugging Face hub (VLLM_USE_MODELSCOPE)."""
    return os.environ.get("VLLM_USE_MODELSCOPE", "").strip().lower() in ("1", "true")
