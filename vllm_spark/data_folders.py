"""The project's data folders (inside an installed package, or at the top of a checkout) and this user's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from vllm_spark.errors import SparkError

_PROJECT = 'name = "vllm-spark"'
"""A line of the file pyproject.toml of this project alone."""


_PACKAGE = Path(__file__).parent


def data_folder(name: Literal["patches", "configs"]) -> Path:
    """Where the files of `name` are: in the installed package, or beside the package in this project's checkout.

    Raises:
        SparkError: in neither. A folder of that name beside an installed package is somebody else's.
    """
    installed = _PACKAGE / "data" / name
    if installed.is_dir():
        return installed
    if _is_checkout(_PACKAGE.parent):
        return _PACKAGE.parent / name
    raise SparkError(
        f"this installation of vllm-spark is incomplete: there is no folder {installed}; install it again: "
        "pip install --force-reinstall --no-deps vllm-spark, or the same with the path of its source tree"
    )


def _is_checkout(folder: Path) -> bool:
    """Whether `folder` is the top of this project's source tree."""
    try:
        return _PROJECT in (folder / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False


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
