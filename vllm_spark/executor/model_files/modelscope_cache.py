"""Models that were downloaded from ModelScope: where its library has put them, over the years, on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def cached_in_modelscope(name: str) -> Iterator[Path]:
    """Folders that may hold the model `OWNER/NAME`; whether one is there is for the caller to see."""
    owner, _, model = name.partition("/")
    for folder in _model_folders():
        yield from sorted((folder / f"{owner}--{model}" / "snapshots").glob("*"))
        yield folder / owner / model.replace(".", "___")
        yield folder / owner / model


def all_in_modelscope() -> Iterator[Path]:
    """Folders that may each hold a model."""
    for folder in _model_folders():
        yield from sorted(folder.glob("*--*/snapshots/*"))
        yield from sorted(folder.glob("*/*"))


def _model_folders() -> Iterator[Path]:
    cache = Path(os.path.expanduser(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope"))
    yield from (cache / "models", cache / "hub" / "models", cache / "hub")
