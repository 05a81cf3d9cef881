"""How every file of a table is read and written: no key twice, no half of a file, one sentence for what is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_spark.errors import ConfigurationError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else, or a key twice.
    """
    content = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def row_numbers(value: object) -> object:
    """Refuses keys that are no numbers from 1 up, or are written in more than one way (`01`), so that no row is double.

    For pydantic, before a field that maps numbers to rows.
    """
    if isinstance(value, dict):
        for key in value:
            if not is_row_number(str(key)):
                raise ValueError(f"{key!r} is no number of tokens")
    return value


def is_row_number(key: str) -> bool:
    """Whether a key of a JSON object is a number from 1 up in its one usual form."""
    return key.isascii() and key.isdigit() and not key.startswith("0")


def first_fault(error: ValidationError) -> str:
    """The first thing that pydantic found: where, and what."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"] if part != "[key]")
    what = str(fault["msg"]).removeprefix("Value error, ")
    what = what[:1].lower() + what[1:]
    return f"{where}: {what}" if where else what


def write_whole(path: Path, text: str) -> None:
    """Writes a file, whole or not at all, and makes its folder.

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
            f"the table {path} cannot be written ({error.strerror}); give a folder in which you may write"
        ) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice, and readers of JSON drop one of them in silence")
        found[key] = value
    return found
