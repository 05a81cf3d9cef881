"""`vllm-spark bench`: measurements on this machine, compared with what vLLM uses without this project."""

from __future__ import annotations

import argparse

from vllm_spark.cli import Command
from vllm_spark.cli.bench import calibrate, collective, decode, wire

SUMMARY = "measure collectives, decode steps or the wire, or find the launch shapes of this GPU"

_KINDS: dict[str, Command] = {"collective": collective, "decode": decode, "calibrate": calibrate, "wire": wire}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the kinds of measurement, each with its own options."""
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, module in _KINDS.items():
        kind = kinds.add_parser(name, help=module.SUMMARY, description=module.SUMMARY, allow_abbrev=False)
        module.add_arguments(kind)
        kind.set_defaults(parser=kind)  # prints its own usage for an unknown argument


def run(args: argparse.Namespace) -> int:
    """Measures, prints tables, and writes the requested files."""
    return _KINDS[args.what].run(args)
