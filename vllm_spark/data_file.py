"""Files that one command writes for others to read: written whole or not at all, and one sentence for what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from vllm_spark.errors import ConfigurationError
from vllm_spark.wording import lower_first


def write_whole(path: Path, text: str, what: str) -> None:
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
