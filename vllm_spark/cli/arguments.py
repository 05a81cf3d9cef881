"""What options of several commands take: argparse types that explain themselves."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mib": 1 << 20}
_LARGEST = 64 << 20


def sizes(text: str) -> tuple[int, ...]:
    """`4KiB,1MiB` in bytes."""
    return tuple(_size(word) for word in text.split(","))


def _size(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 4096, 4KiB or 1MiB")
    size = int(match.group(1)) * unit
    if not 2 <= size <= _LARGEST or size % 2:
        raise argparse.ArgumentTypeError(f"{text} is out of range; sizes are even, from 2 bytes to 64MiB")
    return size


def positive(text: str) -> int:
    """A whole number of samples, steps or rounds."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def positives(text: str) -> tuple[int, ...]:
    """`1,4,8`, each as `positive` takes it."""
    return tuple(positive(word) for word in text.split(","))


def up_to(most: float, kind: type[int] | type[float] = float) -> Callable[[str], float]:
    """A number above 0 and at most `most`."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most {most:g}")
        return value

    return convert


def engine_arguments(text: str) -> dict[str, Any]:
    """A JSON object: more arguments of `vllm.LLM`."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object; write it as in '{{\"block_size\": 32}}'")
    return value


def words(text: str) -> str:
    """A text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; write something")
    return text


def user_path(text: str) -> Path:
    """A file or folder, also as `--option=~/name`, which shells leave as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"there is no home folder for {text!r}") from None
