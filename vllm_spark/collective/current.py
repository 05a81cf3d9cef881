"""The runtime of this process: made by whoever joins the ranks, found by whoever runs collectives.

Here too: how many collectives between the ranks it did not take. Other threads read that while a model is loading,
so it must not live in a module that imports the model's world.
"""

from __future__ import annotations

from vllm_spark.collective.errors import UsageError
from vllm_spark.collective.runtime import Runtime

_installed: Runtime | None = None
_fallbacks = 0


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


def count_fallback() -> None:
    """Notes one collective between the two ranks that went another way. For the thread that runs the model."""
    global _fallbacks
    _fallbacks += 1


def fallbacks() -> int:
    """How many have been noted in this process."""
    return _fallbacks
