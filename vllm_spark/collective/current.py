"""The runtime of this process, and the number of collectives that did not use it.

Other threads read that number while a model is loading, so this module must not import vLLM's modules.
"""

from __future__ import annotations

from vllm_spark.collective.errors import UsageError
from vllm_spark.collective.runtime import Runtime

_installed: Runtime | None = None
_fallbacks = 0


def install(runtime: Runtime) -> None:
    """Makes `runtime` the process's runtime.

    Raises:
        UsageError: another one is still open.
    """
    global _installed
    if _installed is not None and _installed is not runtime and not _installed.closed:
        raise UsageError("this process has an open runtime already; close that one first")
    _installed = runtime


def installed() -> Runtime | None:
    """The process's runtime; None if there is none or it was closed."""
    return None if _installed is None or _installed.closed else _installed


def count_fallback() -> None:
    """Counts a collective between the two ranks that used another path. For the thread that runs the model."""
    global _fallbacks
    _fallbacks += 1


def fallbacks() -> int:
    """The number of such collectives in this process."""
    return _fallbacks
