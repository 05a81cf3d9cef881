"""The runtime of this process: made by whoever joins the ranks, found by whoever runs collectives."""

from __future__ import annotations

from vllm_spark.collective.errors import UsageError
from vllm_spark.collective.runtime import Runtime

_installed: Runtime | None = None


def install(runtime: Runtime) -> None:
    """Makes `runtime` the process's runtime.

    Raises:
        UsageError: there is another one that is still open.
    """
    global _installed
    if _installed is not None and _installed is not runtime and not _installed.closed:
        raise UsageError("this process has an open runtime already; close that one first")
    _installed = runtime


def installed() -> Runtime | None:
    """The process's runtime; None if there is none or it was closed."""
    return None if _installed is None or _installed.closed else _installed


def uninstall() -> None:
    """Forgets the process's runtime, without closing it."""
    global _installed
    _installed = None
