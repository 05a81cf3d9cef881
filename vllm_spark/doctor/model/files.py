"""Checks of a model's files on one machine: whether they are there, and complete."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor.finding import Finding
from vllm_spark.errors import RefusedError, upper_first
from vllm_spark.executor.model_files.hub_cache import cached_snapshot, is_path, may_download
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.executor.model_files.own import find_own
from vllm_spark.executor.model_files.weights import CONSOLIDATED, missing_weights, weight_files

_ID, _TITLE = "model.files", "Files on this machine"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "tokenizer_config.json")
_LONGEST_HEADER = 100 << 20  # bytes; the format's own limit
_NAMED = 3  # of several files, in a sentence


def place_of(name: str, config: SparkConfig) -> Path | None:
    """Where this machine has the model `name`, a path or a name on the hub; None if it has not."""
    if (mapped := config.mapped_folders.get(name)) is not None:
        return mapped
    if is_path(name) or os.path.exists(name):
        place = Path(os.path.abspath(os.path.expanduser(name)))
        return place if place.exists() else None
    return cached_snapshot(name, None)


def weights_of(place: Path) -> list[Path]:
    """The weight files that vLLM loads from a model's folder, as far as they are there."""
    try:
        names = sorted(os.listdir(place))
    except OSError:
        return []
    return [place / name for name in weight_files(place, names, _format_of(place))]


def check_files(name: str, config: SparkConfig) -> Finding:
    """Whether the machine that is asked to serve a model has all of its files.

    Args:
        name: a path, or a name on the hub.
        config: this machine's settings.
    """
    place = place_of(name, config)
    if place is None:
        if is_path(name):
            what = "Neither rank can load it."
            return Finding(_ID, _TITLE, "problem", f"there is no {name}", what, f"ls -d {name}   # its folder")
        return _absent(name)
    return _incomplete(name, place) or Finding(_ID, _TITLE, "ok", _summary(place))


def only_configuration() -> Finding:
    """The finding that a model has no files, since this project has its configuration alone."""
    return Finding(_ID, _TITLE, "not applicable", "this project has its configuration alone")


def check_files_of(wanted: LoadedFiles, config: SparkConfig, *, sends_files: bool) -> Finding:
    """Whether this machine has the files that its leader has, wherever they are.

    Args:
        wanted: what the leader has.
        config: this machine's settings.
        sends_files: whether the leader sends what is not here.
    """
    try:
        place = find_own(wanted, mapping=config.mapped_folders, download=False)
    except RefusedError as error:
        sentence, _, remedy = str(error).partition("; ")
        if not sends_files:
            return Finding(_ID, _TITLE, "problem", "not here", f"{upper_first(sentence)}.", upper_first(remedy))
        return Finding(
            _ID,
            _TITLE,
            "note",
            "not here",
            f"{upper_first(sentence)}. The leader sends it over the cable when the pair starts, which delays that "
            "start once.",
        )
    return Finding(_ID, _TITLE, "ok", f"{place}, the same as the leader's")


def _absent(name: str) -> Finding:
    if may_download():
        return Finding(
            _ID,
            _TITLE,
            "note",
            "not in this user's cache of the hub",
            "vllm serve copies it from the other machine if that has it, and else downloads it before it answers "
            "anything.",
            f"hf download {name}",
        )
    return Finding(
        _ID,
        _TITLE,
        "warning",
        "not in this user's cache of the hub, and HF_HUB_OFFLINE is set",
        "vllm serve finds it only if the other machine has it.",
        f"HF_HUB_OFFLINE=0 hf download {name}",
    )


def _incomplete(name: str, place: Path) -> Finding | None:
    """The finding that something is missing or damaged in a model's folder; None if nothing is."""
    again = f"hf download {name}" if not is_path(name) else f"ls -l {place}   # compare with where it was copied from"
    if missing := missing_weights(place, _format_of(place)):
        return Finding(
            _ID,
            _TITLE,
            "problem" if is_path(name) else "warning",
            f"{place} lacks {_named(missing)}",
            "The index of its weights names these files. "
            + ("vLLM does not start without them." if is_path(name) else "vLLM downloads them before it starts."),
            again,
        )
    weights = weights_of(place)
    if not weights:
        explanation = "A folder without weights cannot be served, but with --load-format dummy."
        return Finding(_ID, _TITLE, "problem", f"{place} has no weights", explanation, again)
    for path in weights:
        if fault := _fault_of(path):
            return Finding(
                _ID,
                _TITLE,
                "problem",
                f"{path} {fault}",
                "A download or a copy of it was cut off; vLLM would end while it loads.",
                f"rm {path} && {again}" if not is_path(name) else again,
            )
    if not any((place / each).exists() for each in _TOKENIZERS):
        explanation = "Without a tokenizer the HTTP API takes token ids alone (--skip-tokenizer-init)."
        return Finding(_ID, _TITLE, "warning", f"{place} has no tokenizer", explanation, again)
    return None


def _fault_of(path: Path) -> str:
    """What is wrong with the length of a safetensors file; empty if nothing is, or if it is of another format."""
    try:
        size = path.stat().st_size
        if path.suffix != ".safetensors":
            return "is empty" if size == 0 else ""
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                return f"has {size} bytes, and is not a safetensors file"
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return "has a damaged header"
    return f"has {size} of {whole} bytes" if size < whole else ""


def _summary(place: Path) -> str:
    weights = weights_of(place)
    size = sum(path.stat().st_size for path in weights)
    return f"{place}: {len(weights)} weight file{'' if len(weights) == 1 else 's'}, {_gigabytes(size)}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _format_of(place: Path) -> str:
    return "mistral" if any(place.glob(CONSOLIDATED)) else "hf"


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
