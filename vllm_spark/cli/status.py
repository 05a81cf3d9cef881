"""`vllm-spark status`: what a pair that serves consists of, and what it does now."""

from __future__ import annotations

import argparse
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException

from rich.console import Console

from vllm_spark.cli.arguments import words
from vllm_spark.errors import EXIT_LOST, ConfigurationError, SparkError, lower_first, without_stop

SUMMARY = "show what the pair that serves consists of, and what it does now"

DEFAULT_URL = "http://localhost:8000"
KEY_VARIABLE = "VLLM_API_KEY"
_SECONDS = 10.0
_LARGEST = 1 << 20  # bytes of an answer


class _NoAnswerError(SparkError):
    """No pair answered."""

    exit_code = EXIT_LOST


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `vllm-spark status`."""
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
    from vllm_spark.backend.pair_status.report import StatusReport
    from vllm_spark.backend.pair_status.table import lines, show_table
    from vllm_spark.records import RecordError, from_json

    url = checked_url(args.url)
    answer = fetch_status(url, checked_key(args.api_key or os.environ.get(KEY_VARIABLE, "")))
    try:
        report = from_json(answer, StatusReport)
    except RecordError as error:
        raise _NoAnswerError(
            f"the answer of {url} is not a status ({error}); use the version of vllm-spark that serves there"
        ) from None
    if args.json:
        print(answer.decode())
    elif report.facts is None:
        state = f"has failed: {lower_first(report.failure)}" if report.failure else "has not started yet"
        raise _NoAnswerError(f"{url} serves no pair now, its engine {state}")
    elif sys.stdout.isatty():
        show_table(report, Console(highlight=False), now=True)
    else:
        for line in lines(report, now=True):
            print(line)
    return 0 if report.failure is None else EXIT_LOST


def checked_url(url: str) -> str:
    """The URL without a path that clients of the API may have.

    Raises:
        ConfigurationError: it is not one of HTTP, or has more than host, port and path.
    """
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urllib.parse.urlsplit(full)
        (parts.hostname or "").encode("idna")  # as for the name's look-up
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or "@" in parts.netloc or parts.query or parts.fragment or not _fits_a_path(parts.path):
        raise ConfigurationError(f"--url {url} is invalid: must be as {DEFAULT_URL}")
    return full.rstrip("/").removesuffix("/v1").rstrip("/")


def checked_key(key: str) -> str:
    """The API key.

    Raises:
        ConfigurationError: no HTTP header can contain it.
    """
    if not (key.isascii() and key.isprintable()):
        raise ConfigurationError(
            f"the API key of --api-key or {KEY_VARIABLE} is invalid: must consist of printable ASCII characters"
        )
    return key


def _fits_a_path(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def fetch_status(url: str, key: str) -> bytes:
    """The answer of the server at `url`. Proxies are not asked: the leader is one of two machines on a desk.

    Raises:
        SparkError: no server of a pair answers there, or it requires another key.
    """
    from vllm_spark.backend.pair_status.report import PATH

    request = urllib.request.Request(url + PATH, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=_SECONDS) as response:
            content: bytes = response.read(_LARGEST)
            return content
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 401:
            raise _NoAnswerError(
                f"{url} requires another API key; give it with --api-key or in the variable {KEY_VARIABLE}"
            ) from None
        raise _NoAnswerError(
            f"{url} has no status of a pair (HTTP status {error.code}); give with --url the address of vllm serve "
            "with --spark"
        ) from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        text = without_stop(str(getattr(reason, "strerror", None) or reason)).lower()
        raise _NoAnswerError(
            f"no server answers at {url} ({text}); start vllm serve with --spark, or give its address with --url"
        ) from None
