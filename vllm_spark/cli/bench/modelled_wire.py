"""The modelled wire between two ranks of one machine, as options of the benchmarks."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from vllm_spark.cli.arguments import user_path
from vllm_spark.config import setting_type
from vllm_spark.errors import ConfigurationError
from vllm_spark.wire_model import CABLE, load_wire_model


class ModelledWire(NamedTuple):
    """What the loopback transport puts between two ranks: latency + bytes / bandwidth; 0 GB/s: unlimited."""

    latency_us: float = CABLE.latency_us
    gbytes_per_s: float = CABLE.gbytes_per_s


def add_wire_arguments(parser: argparse.ArgumentParser) -> None:
    """The modelled wire: the defaults are those of the cable between two GB10."""
    parser.add_argument(
        "--latency-us",
        type=setting_type("loopback_latency_us"),
        metavar="MICROSECONDS",
        help=f"of the modelled wire (default: {CABLE.latency_us:g})",
    )
    parser.add_argument(
        "--gbytes-per-s",
        type=setting_type("loopback_gbytes_per_s"),
        metavar="GB/S",
        help=f"of the modelled wire (default: {CABLE.gbytes_per_s:g}; 0: unlimited)",
    )
    parser.add_argument(
        "--wire",
        type=user_path,
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
    fit = load_wire_model(args.wire).total.fit
    return ModelledWire(fit.latency_us, fit.gbytes_per_s)
