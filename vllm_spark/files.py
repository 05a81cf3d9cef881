"""Folders of this project (package data, the user's settings, the user's state), and writing files.

`configs_folder`, `configuration_folder` and `state_folder` are the folders; `atomic_write_text` writes a file.
"""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from vllm_spark.errors import ConfigurationError


def configs_folder() -> Path:
    """The folder with this package's tables and models' configurations."""
    return Path(str(importlib.resources.files("vllm_spark.configs")))


def configuration_folder() -> Path | None:
    """The folder with this user's settings; None for a user without a home folder."""
    return _folder_of_user("XDG_CONFIG_HOME", ".config")


def state_folder() -> Path | None:
    """The folder with the files that this project creates for this user; None without a home folder."""
    return _folder_of_user("XDG_STATE_HOME", ".local/state")


def atomic_write_text(path: Path, text: str, what: str) -> None:
    """Writes a file atomically, and creates its folder.

    Args:
        path: the file.
        text: its new content.
        what: the kind of file in messages, such as `launch table`.

    Raises:
        ConfigurationError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigurationError(
            f"the {what} {path} cannot be written ({error.strerror}); give a folder in which you may write"
        ) from None


def check_writable(path: Path) -> None:
    """Raises ConfigurationError if the file `path` cannot be written: before work whose result would be lost."""
    if not os.access(path.resolve().parent, os.W_OK):
        raise ConfigurationError(f"{path} cannot be written: {path.resolve().parent} is not a writable folder")
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise ConfigurationError(f"{path} cannot be written: it is a folder, or protected; give another file")


def _folder_of_user(variable: str, below_home: str) -> Path | None:
    """According to the XDG Base Directory Specification, by which relative folders are ignored."""
    folder = Path(os.environ.get(variable, ""))
    try:
        return (folder if folder.is_absolute() else Path.home() / below_home) / "vllm-spark"
    except RuntimeError:
        return None
