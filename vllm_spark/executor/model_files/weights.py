"""Which files of a model's folder vLLM's default loader reads, for each load format."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from vllm_spark.files import JOURNAL_FILE, read_regular

CONSOLIDATED = "consolidated*.safetensors"
_INDEX = "model.safetensors.index.json"
_SAFETENSORS = ("*.safetensors",)
_OF_A_TRAINER = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")


class _Reads(NamedTuple):
    """Patterns of names, of which the first that matches counts, and the file that lists the safetensors files."""

    patterns: tuple[str, ...]
    listed_in: str = _INDEX


_FORMATS = {
    "hf": _Reads(("*.safetensors", "*.bin", "*.pt")),
    "safetensors": _Reads(_SAFETENSORS),
    "fastsafetensors": _Reads(_SAFETENSORS),
    "instanttensor": _Reads(_SAFETENSORS),
    "mistral": _Reads((CONSOLIDATED,), "consolidated.safetensors.index.json"),
    "pt": _Reads(("*.pt",)),
    "npcache": _Reads(("*.bin", "*.pt")),
}
_OTHERS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")

FILE_FORMATS = frozenset(_FORMATS)
"""Load formats that read weight files out of the model's folder. (`auto` stands for `hf` or `mistral`.)"""


def weight_files(folder: Path, names: Sequence[str], load_format: str) -> list[str]:
    """The names, of those in a folder, of the weight files that are loaded.

    A folder may hold the same weights several times. Of safetensors files those alone are loaded that the index names,
    if there is one. Loaders other than vLLM's default one choose by themselves: all files of the first kind count.

    Args:
        folder: the model's.
        names: of the files in it.
        load_format: vLLM's, not `auto`.
    """
    reads = _FORMATS.get(load_format)
    for pattern in reads.patterns if reads else _OTHERS:
        found = [name for name in names if fnmatchcase(name, pattern) and is_content(folder / name)]
        if not found:
            continue
        if reads is None:
            return found
        if not pattern.endswith(".safetensors"):
            return [name for name in found if not name.endswith(_OF_A_TRAINER)]
        indexed = _indexed(folder / reads.listed_in)
        return found if indexed is None else [name for name in found if name in indexed]
    return []


def missing_weights(folder: Path, load_format: str = "hf") -> list[str]:
    """Weight files that the index of a model's folder names and that are not in it."""
    reads = _FORMATS.get(load_format)
    indexed = _indexed(folder / (reads.listed_in if reads else _INDEX))
    return sorted(name for name in indexed or () if not os.path.exists(folder / name))


def _indexed(index: Path) -> set[str] | None:
    """The files that an index names; None if there is none that can be read."""
    try:
        return {str(name) for name in json.loads(read_regular(index, JOURNAL_FILE))["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def is_content(path: Path) -> bool:
    """Whether it is a file, or cannot be looked at, which who reads it is told. Reading a pipe would not end."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True
