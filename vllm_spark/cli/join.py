"""`vllm-spark join`: runs the follower on the second machine."""

from __future__ import annotations

import argparse

from vllm_spark.backend.logging import log_as
from vllm_spark.config.settings import SparkConfig, add_flags, given_flags, log_environment_warnings

SUMMARY = "run the follower: connect to a leader, and to the next one after it (on the second machine)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the follower's own settings; all others come from the leader."""
    add_flags(parser, ["follower", "both"], prefix="--")
    parser.add_argument("--once", action="store_true", help="end when the first leader leaves or does not fit")


def run(args: argparse.Namespace) -> int:
    """Follows one leader after the other. Returns the exit code when stopped or refused."""
    from vllm_spark.entrypoints.join import supervise

    log_as("vllm-spark join")
    config = SparkConfig.resolve(flags=given_flags(args))
    log_environment_warnings()
    return supervise(config, once=args.once)
