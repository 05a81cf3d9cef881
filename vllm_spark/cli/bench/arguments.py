"""What the benchmarks' command lines have in common: options, and argparse types that explain themselves."""

from __future__ import annotations

import argparse
import re

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mib": 1 << 20}
_LARGEST = 64 << 20
_LARGEST_AMOUNT = 1e6


def add_wire_arguments(parser: argparse.ArgumentParser) -> None:
    """The modelled wire: the defaults are those of the cable between two GB10 (DGX Spark, 4 KiB, one way)."""
    parser.add_argument("--latency-us", type=amount, default=3.2, help="of the modelled wire (default: 3.2)")
    parser.add_argument(
        "--gbytes-per-s", type=amount, default=24.0, help="of the modelled wire (default: 24; 0: unlimited)"
    )


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


def amount(text: str) -> float:
    """A number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= _LARGEST_AMOUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to {_LARGEST_AMOUNT:g}")
    return value
