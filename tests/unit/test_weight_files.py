"""The weight files that are compared are those that vLLM's own loader picks, for each load format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_spark.executor.model_files.weights import FILE_FORMATS, weight_files

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import LoadConfig
from vllm.model_executor.model_loader import get_model_loader

SHARDED = frozenset({"model-1.safetensors", "model-2.safetensors", "copy.safetensors"})
OTHER = frozenset({"model.bin", "training_args.bin", "model.pt", "optimizer.pt"})
MISTRAL = frozenset({"consolidated.safetensors", "consolidated-1.safetensors"})
FOLDERS = {
    "sharded": SHARDED,
    "sharded and other formats": SHARDED | OTHER,
    "every format": SHARDED | MISTRAL | OTHER,
    "other formats": OTHER,
    "mistral": MISTRAL,
}
INDEXES = {
    "model.safetensors.index.json": frozenset({"model-1.safetensors", "model-2.safetensors"}),
    "consolidated.safetensors.index.json": frozenset({"consolidated-1.safetensors"}),
}


def make_folder(folder: Path, names: frozenset[str], *, with_indexes: bool) -> Path:
    """Empty files; an index is written where the files that it lists are."""
    for name in names:
        (folder / name).touch()
    for name, listed in INDEXES.items():
        if with_indexes and listed <= names:
            (folder / name).write_text(json.dumps({"weight_map": {f"layer of {file}": file for file in listed}}))
    return folder


def vllms_choice(folder: Path, load_format: str) -> list[str]:
    loader = get_model_loader(LoadConfig(load_format=load_format))
    try:
        _, paths, *_ = loader._prepare_weights(str(folder), None, None, True, None)
    except RuntimeError as error:
        if "Cannot find any model weights" not in str(error):
            raise
        return []
    return sorted(Path(path).name for path in paths)


@pytest.mark.parametrize("with_indexes", [False, True], ids=["no index", "indexes"])
@pytest.mark.parametrize("names", FOLDERS.values(), ids=FOLDERS.keys())
@pytest.mark.parametrize("load_format", sorted(FILE_FORMATS))
def test_vllms_loader_chooses_the_same_files(
    tmp_path: Path, load_format: str, names: frozenset[str], with_indexes: bool
) -> None:
    folder = make_folder(tmp_path, names, with_indexes=with_indexes)
    present = sorted(path.name for path in folder.iterdir())
    assert sorted(weight_files(folder, present, load_format)) == vllms_choice(folder, load_format)
