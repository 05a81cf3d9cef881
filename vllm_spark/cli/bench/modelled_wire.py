"""The modelled wire between two ranks of one machine, as options of the benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from vllm_spark.cli.arguments import amount
from vllm_spark.errors import ConfigurationError


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
