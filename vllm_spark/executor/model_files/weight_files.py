"""Which weight files of a model's folder vLLM's loader reads, for each load format.

A folder may hold the same weights several times: in other formats, as copies that no index lists, or as Mistral's
consolidated files. vLLM takes the first pattern of its load format that matches a file, and of safetensors files those
that the index lists, if there is one (`DefaultModelLoader._prepare_weights`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

_MODEL_INDEX = "model.safetensors.index.json"
_MISTRAL_INDEX = "consolidated.safetensors.index.json"
_MISTRAL_FILES = "consolidated*.safetensors"
_PATTERNS: dict[str, tuple[str, ...]] = {
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "safetensors": ("*.safetensors",),
    "fastsafetensors": ("*.safetensors",),
    "instanttensor": ("*.safetensors",),
    "mistral": (_MISTRAL_FILES,),
    "pt": ("*.pt",),
    "npcache": ("*.bin", "*.pt"),
    "runai_streamer": ("*.safetensors",),
    "sharded_state": ("*.safetensors",),
}
_OTHER_FORMATS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
"""For formats of plugins, of which it is not known what they read."""
_WITHOUT_INDEX = frozenset({"sharded_state", "runai_streamer_sharded", "tensorizer"})
_OF_TRAINING = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")

FILE_FORMATS = frozenset({"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "pt", "npcache"})
"""Load formats of vLLM's default loader, which reads weight files out of the model's folder."""


def resolved_format(load_format: str, names: Iterable[str]) -> str:
    """The load format that vLLM chooses for `auto` in a folder with files of these names; any other as it is."""
    if load_format != "auto":
        return load_format
    return "mistral" if any(fnmatchcase(name, _MISTRAL_FILES) for name in names) else "hf"


def weight_files(folder: Path, names: Iterable[str], load_format: str) -> list[str]:
    """Names of the weight files that vLLM reads, in the order of `names`; files that an index lists may be missing.

    Args:
        folder: of the model.
        names: of the files in it.
        load_format: as in vLLM's LoadConfig.
    """
    names = list(names)
    load_format = resolved_format(load_format, names)
    for pattern in _PATTERNS.get(load_format, _OTHER_FORMATS):
        found = [name for name in names if fnmatchcase(name, pattern) and not name.startswith(".")]
        if not found:
            continue
        if not pattern.endswith(".safetensors"):
            return [name for name in found if not name.endswith(_OF_TRAINING)]
        if load_format in _WITHOUT_INDEX or (listed := _listed(folder, load_format)) is None:
            return found
        return [name for name in found if name in listed]
    return []


def missing_weights(folder: Path, load_format: str = "hf") -> list[str]:
    """Weight files that the index of a model's folder lists and that are not in it."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return []
    listed = _listed(folder, resolved_format(load_format, names)) or set()
    return sorted(name for name in listed if not (folder / name).exists())


def _listed(folder: Path, load_format: str) -> set[str] | None:
    """Names of the files that the index lists; None without an index, or with one that vLLM cannot read either."""
    try:
        index = json.loads((folder / (_MISTRAL_INDEX if load_format == "mistral" else _MODEL_INDEX)).read_bytes())
        return {str(name) for name in index["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
