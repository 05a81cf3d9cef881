"""`vllm-spark status`: what a pair that serves consists of, and what it does now."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from vllm_spark.backend.pair_status.client import (
    DEFAULT_URL,
    KEY_VARIABLE,
    LeaderApi,
    NoAnswerError,
    StatusError,
    checked_url,
)
from vllm_spark.cli.arguments import words
from vllm_spark.errors import EXIT_LOST, lower_first

if TYPE_CHECKING:
    from vllm_spark.backend.pair_status.report import StatusReport

SUMMARY = "show what the pair that serves consists of, and what it does now"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `vllm-spark status`."""
    add_server_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object to standard output, and nothing else"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the status: on a terminal as a table, else as lines.

    Returns:
        0, or EXIT_LOST if the engine of the pair has failed.

    Raises:
        SparkError: no server of a pair answers at the URL.
    """
    from vllm_spark.backend.pair_status.table import lines, show_table

    url = checked_url(args.url)
    answer, report = read_status(LeaderApi(url, args.api_key))
    if args.json:
        print(answer.decode())
    elif report.facts is None:
        raise no_pair(url, report)
    elif sys.stdout.isatty():
        show_table(report, Console(highlight=False), now=True)
    else:
        for line in lines(report, now=True):
            print(line)
    return 0 if report.failure is None else EXIT_LOST


def no_pair(url: str, report: StatusReport) -> NoAnswerError:
    """The error that the server at `url` serves no pair now, and why."""
    state = f"has failed: {lower_first(report.failure)}" if report.failure else "has not started yet"
    return NoAnswerError(f"{url} serves no pair now, its engine {state}")


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name the leader's HTTP API, and its key."""
    parser.add_argument(
        "--url",
        type=words,
        default=DEFAULT_URL,
        metavar="URL",
        help=f"of the leader's HTTP API, from either machine (default: {DEFAULT_URL})",
    )
    parser.add_argument(
        "--api-key",
        type=words,
        metavar="KEY",
        help=f"the server's API key, if it has one (default: the variable {KEY_VARIABLE})",
    )


def read_status(api: LeaderApi) -> tuple[bytes, StatusReport]:
    """The status of the pair that serves there: the JSON, and what is in it.

    Raises:
        NoAnswerError: no server of a pair answers.
    """
    from vllm_spark.backend.pair_status.report import PATH, StatusReport
    from vllm_spark.records import RecordError, from_json

    try:
        answer = api.ask(PATH)
        return answer, from_json(answer, StatusReport)
    except StatusError as error:
        raise NoAnswerError(
            f"{api.url} has no status of a pair (HTTP status {error.status}); give with --url the address of "
            "vllm serve with --spark"
        ) from None
    except RecordError as error:
        raise NoAnswerError(
            f"the answer of {api.url} is not a status ({error}); use the version of vllm-spark that serves there"
        ) from None
