"""How every file of a table is read: no key twice, and numbers of tokens in their one usual form."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

LARGEST_ROW = 2**20
"""Tokens of a step: more than any engine takes, and few enough to look at each."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else, or a key twice.
    """
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def row_numbers(value: object) -> object:
    """Refuses keys that are no numbers of tokens, or are written in more than one way (`01`), so that no row is double.

    For pydantic, before a field that maps numbers to rows.
    """
    if isinstance(value, dict):
        for key in value:
            if not is_row_number(str(key)):
                raise ValueError(f"{reprlib.repr(key)} is no number of tokens from 1 to {LARGEST_ROW}")
    return value


def is_row_number(key: str) -> bool:
    """Whether a key of a JSON object is a number from 1 to `LARGEST_ROW` in its one usual form."""
    usual = key.isascii() and key.isdigit() and not key.startswith("0")
    return usual and len(key) <= len(str(LARGEST_ROW)) and int(key) <= LARGEST_ROW


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice, and readers of JSON drop one of them in silence")
        found[key] = value
    return found
