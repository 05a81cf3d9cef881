"""Options that several commands share: both sides, argparse types with clear errors, console, modelled wire."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_spark.collective.link_model import CABLE, PUBLISHED_FIGURES, WireFigures, load_wire_figures
from vllm_spark.config.settings import setting_type
from vllm_spark.errors import ConfigurationError

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mib": 1 << 20}
_LARGEST = 64 << 20
_FILE_WIDTH = 120  # columns, if the output is not a terminal


def add_sides(group: Any, what: str, *, required: bool) -> None:
    """Adds `--listen` and `--connect`, of which each of two machines has one.

    Args:
        group: of argparse, or the parser.
        what: that the listening machine determines, a participle.
        required: whether one of them must be given.
    """
    side = group.add_mutually_exclusive_group(required=required)
    side.add_argument("--listen", action="store_true", help=f"wait for the other machine, and determine what is {what}")
    side.add_argument(
        "--connect",
        type=setting_type("leader"),
        metavar="ADDRESS[:PORT]",
        help="connect to the machine that listens there",
    )


def sizes(text: str) -> tuple[int, ...]:
    """`4KiB,1MiB` in bytes."""
    return tuple(_size(word) for word in text.split(","))


def _size(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 4096, 4KiB or 1MiB")
    size = int(match.group(1)) * unit
    if not 2 <= size <= _LARGEST or size % 2:
        raise argparse.ArgumentTypeError(f"{text} is out of range; sizes are even, from 2 bytes to 64MiB")
    return size


def positive(text: str) -> int:
    """A whole number of samples, steps or rounds."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def positives(text: str) -> tuple[int, ...]:
    """Numbers such as `1,4,8`, each as in `positive`."""
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
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object; write it as in '{{\"block_size\": 32}}'")
    return value


def words(text: str) -> str:
    """A non-empty text."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a text")
    return text


def user_path(text: str) -> Path:
    """A file or folder, also as `--option=~/name`, which shells leave as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"there is no home folder for {text!r}") from None


def wide_console() -> Console:
    """A console of the terminal's width, or wide enough for tables in a file."""
    return Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)


def add_wire_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the modelled link, with the published figures of two GB10 as default."""
    parser.add_argument(
        "--latency-us",
        type=setting_type("loopback_latency_us"),
        metavar="MICROSECONDS",
        help="a modelled link of one rail, with this latency for every size "
        f"(default: the curve that others published for two GB10; with --gbytes-per-s: {CABLE.latency_us:g})",
    )
    parser.add_argument(
        "--gbytes-per-s",
        type=setting_type("loopback_gbytes_per_s"),
        metavar="GB/S",
        help="the same, with this bandwidth; 0: unlimited "
        f"(default: two rails of {PUBLISHED_FIGURES.rails[0].gbytes_per_s:g}; with --latency-us: "
        f"{CABLE.gbytes_per_s:g})",
    )
    parser.add_argument(
        "--wire",
        type=user_path,
        metavar="FILE",
        help="take rails, latencies and bandwidths from the wire model in this file, which vllm-spark bench wire wrote",
    )


def modelled_wire(args: argparse.Namespace) -> WireFigures:
    """The link that `add_wire_arguments`' options describe.

    Raises:
        ConfigurationError: the file is not a wire model, or contradicts the other options.
    """
    numbers = {"latency_us": args.latency_us, "gbytes_per_s": args.gbytes_per_s}
    given = {name: value for name, value in numbers.items() if value is not None}
    if args.wire is None:
        if not given:
            return PUBLISHED_FIGURES
        return WireFigures.alpha_beta(
            given.get("latency_us", CABLE.latency_us), given.get("gbytes_per_s", CABLE.gbytes_per_s)
        )
    if given:
        flag = "--" + next(iter(given)).replace("_", "-")
        raise ConfigurationError(f"--wire {args.wire} and {flag} contradict each other; leave one out")
    return load_wire_figures(args.wire)
