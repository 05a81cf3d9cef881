"""Where files live: data of this package, settings and state of this user; and how files are written and read."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from pydantic import ValidationError

from vllm_spark.errors import ConfigurationError, lower_first


def configs_folder() -> Path:
    """The tables and the models' configurations that come with this package."""
    return Path(str(importlib.resources.files("vllm_spark.configs")))


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


def atomic_write_text(path: Path, text: str, what: str) -> None:
    """Writes a file, whole or not at all, and makes its folder.

    Args:
        path: where to.
        text: its content.
        what: the file is, for the sentence: `launch table`.

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


def first_fault(error: ValidationError) -> str:
    """The first thing that pydantic found: where, and what."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"] if part != "[key]")
    what = str(fault["msg"]).removeprefix("Value error, ")
    what = lower_first(what)
    return f"{where}: {what}" if where else what
