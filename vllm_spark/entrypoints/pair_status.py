"""The status of a pair on the leader's HTTP server, and its start table."""

from __future__ import annotations

import logging
import os
from typing import Any

from rich.console import Console

from vllm_spark.backend.metrics import exported_status
from vllm_spark.backend.pair_status.report import PATH, StatusReport
from vllm_spark.backend.pair_status.table import UNKNOWN, lines, show_table
from vllm_spark.records import RecordError, to_json

logger = logging.getLogger("vllm_spark")

_STDERR = 2
_EVERY_INTERFACE = ("", "0.0.0.0", "::")


def serve_status(app: Any) -> None:
    """Answers `PATH` with the status of the pair, if this process serves one.

    Args:
        app: the Starlette application of the API server; `app.state.args` is its parsed command line.
    """
    if exported_status() is None:
        return
    from starlette.responses import Response

    clients = _clients(app)

    def status(_: Any) -> Response:
        try:
            report = _report(clients)
        except RecordError as error:
            return Response(f"the status cannot be read: {error}", 503, media_type="text/plain")
        return Response(to_json(report), media_type="application/json")

    app.add_route(PATH, status, include_in_schema=False)


def show_start(app: Any) -> None:
    """Shows the start table: on a terminal as a table, else as lines of the log.

    Args:
        app: as above; of several API servers only the first shows it.
    """
    if exported_status() is None or not _shows_start:
        return
    try:
        report = _report(_clients(app))
    except RecordError as error:
        logger.warning("There is no start table: %s.", error)
        return
    if report.facts is None:
        return  # the engine has logged why
    if not os.isatty(_STDERR):
        for line in lines(report, now=False):
            logger.info("%s.", line)
        return
    # vLLM puts a prefix before each line that its processes write to `sys.stderr`.
    with os.fdopen(os.dup(_STDERR), "w", encoding="utf-8") as stream:
        show_table(report, Console(file=stream, highlight=False), now=False)


_shows_start = True


def leave_start_to_the_first(server: int) -> None:
    """Has only the first of several API servers show the start table.

    Args:
        server: the number of this one, from 0.
    """
    global _shows_start
    _shows_start = server == 0


def _report(clients: str) -> StatusReport:
    status = exported_status()
    assert status is not None
    return StatusReport.of(status, clients)


def _clients(app: Any) -> str:
    """The URL of the HTTP API, from the server's command line."""
    args = getattr(app.state, "args", None)
    if args is None:
        return UNKNOWN
    if getattr(args, "uds", None):
        return f"the socket {args.uds}"
    scheme = "https" if getattr(args, "ssl_keyfile", None) else "http"
    host = getattr(args, "host", None) or ""
    if host in _EVERY_INTERFACE:
        return f"{scheme}://localhost:{args.port} (on every interface)"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}"
