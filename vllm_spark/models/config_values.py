"""Reads values of a config.json by type; a value of another type raises ConfigurationError with its key."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_spark.errors import ConfigurationError

LARGEST = 2**31 - 1
"""Largest allowed number: kernels use 32-bit sizes."""


def whole_number(config: Mapping[str, Any], key: str, least: int = 1, most: int = LARGEST) -> int | None:
    """A number from `least` to `most`; None if missing."""
    value = config.get(key)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise _fault(key, value, f"a whole number from {least} to {most}")
    return value


def items(config: Mapping[str, Any], key: str) -> Sequence[Any]:
    """A list; empty if missing."""
    value = config.get(key)
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _fault(key, value, "a list")
    return value


def names(config: Mapping[str, Any], *keys: str) -> list[str]:
    """The first list of strings that is not empty, with nested lists flattened."""
    for key in keys:
        if found := _flatten(key, items(config, key)):
            return found
    return []


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object; empty if missing."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _fault(key, value, "an object")
    return value


def block(config: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    """Two widths, as in [128, 128] or, in an older format, "128x128"; None if missing."""
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, str):
        value = [int(word) if word.isascii() and word.isdigit() else word for word in value[:40].split("x")]
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(w) is int and 0 < w <= LARGEST for w in value):
        return value[0], value[1]
    raise _fault(key, config.get(key), "two numbers from 1 up, as in [128, 128]")


def _flatten(key: str, entries: Sequence[Any]) -> list[str]:
    found: list[str] = []
    for entry in entries:
        if isinstance(entry, str):
            found.append(entry)
        elif isinstance(entry, list | tuple):
            found += _flatten(key, entry)
        else:
            raise _fault(key, entry, "a list of strings")
    return found


def _fault(key: str, value: object, wanted: str) -> ConfigurationError:
    return ConfigurationError(f"{key} is {reprlib.repr(value)} in config.json; it must be {wanted}")
