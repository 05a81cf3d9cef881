"""The project's data folders: inside an installed package, or at the top of a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def data_folder(name: Literal["patches", "configs"]) -> Path:
    """Where the files of `name` are."""
    package = Path(__file__).parent
    installed = package / "data" / name
    return installed if installed.is_dir() else package.parent / name
