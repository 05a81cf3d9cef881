"""The project's data folders (inside an installed package, or at the top of a checkout) and this user's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


def data_folder(name: Literal["patches", "configs"]) -> Path:
    """Where the files of `name` are."""
    package = Path(__file__).parent
    installed = package / "data" / name
    return installed if installed.is_dir() else package.parent / name


def configuration_folder() -> Path | None:
    """Where this user's settings for the project are; None for a user without a home folder."""
    try:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    except RuntimeError:
        return None
    return folder / "vllm-spark"
