"""`vllm-spark report`: one file for a bug report, without secrets."""

from __future__ import annotations

import argparse
import os
import re
from datetime import datetime
from pathlib import Path

from vllm_spark.backend.pair_status.client import LeaderApi, checked_url
from vllm_spark.cli.arguments import user_path
from vllm_spark.cli.status import add_server_arguments
from vllm_spark.config.settings import SparkConfig, add_flags, given_flags, split_endpoint
from vllm_spark.errors import ConfigurationError, SparkError

SUMMARY = "write one file for a bug report: versions, doctor's findings, status, logs, configuration; no secrets"

_SETTINGS = ("address", "leader", "port", "secret_file")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `vllm-spark report`."""
    parser.epilog = "Each machine has its own report: run it on both. It reads, and changes nothing but the new file."
    parser.add_argument(
        "file",
        nargs="?",
        type=user_path,
        metavar="FILE",
        help="the new file (default: vllm-spark-report-HOST-TIME.txt in the current folder)",
    )
    parser.add_argument(
        "--log",
        action="append",
        default=[],
        type=user_path,
        metavar="FILE",
        help="a file with the output of vllm serve or vllm-spark join, whose last lines are wanted; may be repeated. "
        "The journals of the units vllm-spark-serve and vllm-spark-join are read without it",
    )
    add_server_arguments(parser)
    add_flags(parser, ["leader", "follower", "both"], prefix="--", names=_SETTINGS)


def run(args: argparse.Namespace) -> int:
    """Writes the report, and prints what is in it and where it is.

    Raises:
        ConfigurationError: the file exists, or cannot be written; or an option is invalid.
    """
    from vllm_spark.backend.pair_status.report import PATH
    from vllm_spark.bug_report.contents import Section, sections
    from vllm_spark.bug_report.file import write_report
    from vllm_spark.bug_report.redaction import Redaction
    from vllm_spark.executor.channel.addresses import host_name

    path = args.file or Path(f"vllm-spark-report-{_word(host_name())}-{datetime.now():%Y%m%d-%H%M%S}.txt")
    if os.path.lexists(path):
        raise ConfigurationError(f"{path} exists already, and is not overwritten; give another file, or delete it")
    api, problem = LeaderApi(checked_url(args.url), args.api_key), ""
    try:
        config = SparkConfig.resolve(flags=given_flags(args))
    except SparkError as error:  # that may be what the report is about
        config, problem = SparkConfig(), str(error)
    leader = split_endpoint(config.leader)[0] if config.leader else None
    redaction = Redaction.of_this_user(config, [api.key])

    def status() -> str:
        try:
            return api.ask(PATH).decode(errors="replace")  # as it came: it may be another version's
        except SparkError as error:
            return f"{error}."

    found = [
        Section(redaction.apply(title), redaction.apply(text))
        for title, text in sections(config, problem, status, args.log, leader)
    ]
    write_report(path, found)
    print(f"Wrote {path.absolute()}, which only you may read:")
    for title, text in found:
        count = len(text.splitlines())
        print(f"  {title}: {count} line{'' if count == 1 else 's'}")
    print("Secrets, credentials, home folders and public addresses were replaced.")
    print("Read it before you attach it to an issue, and run vllm-spark report on the")
    print("other machine too: its logs are only there.")
    return 0


def _word(host: str) -> str:
    return re.sub(r"[^\w.-]", "_", host)
