"""What the benchmarks' command lines have in common: options, and argparse types that explain themselves."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from vllm_spark.errors import ConfigurationError

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mib": 1 << 20}
_LARGEST = 64 << 20
_LARGEST_AMOUNT = 1e6


class ModelledWire(NamedTuple):
    """What the loopback transport puts between two ranks: latency + bytes / bandwidth."""

    latency_us: float = 3.2
    gbytes_per_s: float = 24.0


def add_wire_arguments(parser: argparse.ArgumentParser) -> None:
    """The modelled wire: the defaults are those of the cable between two GB10 (DGX Spark, 4 KiB, one way)."""
    parser.add_argument("--latency-us", type=amount, help="of the modelled wire (default: 3.2)")
    parser.add_argument("--gbytes-per-s", type=amount, help="of the modelled wire (default: 24; 0: unlimited)")
    parser.add_argument(
        "--wire",
        type=Path,
        metavar="FILE",
        help="take both from the wire model in this file, which vllm-spark bench wire wrote",
    )


def modelled_wire(args: argparse.Namespace) -> ModelledWire:
    """The wire that `add_wire_arguments`' options describe.

    Raises:
        ConfigurationError: the file is no wire model, or does not go with the other options.
    """
    numbers = {"latency_us": args.latency_us, "gbytes_per_s": args.gbytes_per_s}
    given = {name: value for name, value in numbers.items() if value is not None}
    if args.wire is None:
        return ModelledWire(**given)
    if given:
        flag = "--" + next(iter(given)).replace("_", "-")
        raise ConfigurationError(f"--wire {args.wire} and {flag} contradict each other; leave one out")
    from vllm_spark.wire_model import load_wire_model

    fit = load_wire_model(args.wire).total.fit
    return ModelledWire(fit.latency_us, fit.gbytes_per_s)


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


def engine_arguments(text: str) -> dict[str, Any]:
    """A JSON object: more arguments of `vllm.LLM`."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object; write it as in '{{\"block_size\": 32}}'")
    return value
