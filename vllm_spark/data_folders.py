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
    return _folder_of_user("XDG_CONFIG_HOME", ".config")


def state_folder() -> Path | None:
    """Where what the project makes for this user is; None for a user without a home folder."""
    return _folder_of_user("XDG_STATE_HOME", ".local/state")


def _folder_of_user(variable: str, below_home: str) -> Path | None:
    """As the XDG Base Directory Specification says, which has relative folders ignored."""
    folder = Path(os.environ.get(variable, ""))
    try:
        return (folder if folder.is_absolute() else Path.home() / below_home) / "vllm-spark"
    except RuntimeError:
        return None
