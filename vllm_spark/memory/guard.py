"""The guard: watches memory while an engine runs, warns, and stops the engine before the kernel kills a program."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from vllm_spark.errors import SparkError, described
from vllm_spark.memory.scopes import GIB, Scope, gib, read_scopes

logger = logging.getLogger("vllm_spark")

STALLED = 20.0
"""Percent of the last ten seconds in which all programs waited for memory: then it has run out, even if the kernel
reports some as available. A desktop does not react any more at such values."""

_WARNING_FLOORS = 2
_FASTEST_GROWTH = 8 * GIB  # bytes per second: faster than programs touch new memory
_SHORTEST, _LONGEST = 0.05, 1.0  # seconds between two readings
_OOM_SCORE_FILE = Path("/proc/self/oom_score_adj")
_OOM_SCORE = 900  # of at most 1000


class Decision(NamedTuple):
    """The guard's action for a scope, and its reason as a part of a sentence."""

    action: Literal["none", "warn", "stop"]
    reason: str = ""


def decide(scope: Scope, reserve: int) -> Decision:
    """The action for a scope: `stop` where memory runs out, `warn` where it is about to.

    Args:
        scope: as it is now.
        reserve: what the settings keep free on the machine, in bytes.
    """
    floor = scope.floor(reserve)
    where = f"{gib(scope.available)} of {gib(scope.total)} GiB are available in {scope.name}"
    if scope.available < floor:
        return Decision("stop", f"{where}, and the guard keeps {gib(floor)} GiB free")
    if scope.pressure is not None and scope.pressure >= STALLED and scope.available < scope.reserve_of(reserve):
        return Decision("stop", f"{where}, and programs waited for memory in {scope.pressure:.0f} % of the last 10 s")
    if scope.available < _WARNING_FLOORS * floor:
        return Decision("warn", f"{where}; the engine is stopped below {gib(floor)} GiB")
    return Decision("none")


class MemoryGuard(threading.Thread):
    """Reads what is available every second, and up to twenty times a second where it is little, until it is stopped.

    Args:
        reserve: what the settings keep free on the machine, in bytes.
        host: this machine's name, for messages.
        on_exhausted: called once, from this thread, with the reason to stop the engine.
    """

    def __init__(self, reserve: int, host: str, on_exhausted: Callable[[SparkError], None]) -> None:
        super().__init__(name="spark-memory", daemon=True)
        self._reserve, self._host, self._on_exhausted = reserve, host, on_exhausted
        self._stopped = threading.Event()
        self._warned: set[str] = set()

    def stop(self) -> None:
        """Ends the thread soon; does not wait for it."""
        self._stopped.set()

    def run(self) -> None:
        """The thread's loop."""
        try:
            self._watch()
        except Exception as error:
            logger.warning("Memory is not watched any more: %s.", described(error), exc_info=error)

    def _watch(self) -> None:
        interval = 0.0
        while not self._stopped.wait(interval):
            scopes = read_scopes()
            for scope in scopes:
                decision = decide(scope, self._reserve)
                if decision.action == "stop":
                    self._on_exhausted(
                        SparkError(
                            f"the memory of {self._host} runs out: {decision.reason}; end other programs there, or "
                            "give vLLM less (a smaller KV cache or --gpu-memory-utilization)"
                        )
                    )
                    return
                self._warn(scope, decision)
            slack = min(scope.available - scope.floor(self._reserve) for scope in scopes)
            interval = min(_LONGEST, max(_SHORTEST, slack / _FASTEST_GROWTH))

    def _warn(self, scope: Scope, decision: Decision) -> None:
        """Logs a warning once, and again only after there was enough memory in between."""
        if decision.action == "none":
            if scope.available > 2 * _WARNING_FLOORS * scope.floor(self._reserve):
                self._warned.discard(scope.name)
        elif scope.name not in self._warned:
            self._warned.add(scope.name)
            logger.warning("Memory runs short: %s.", decision.reason)


def raise_oom_score() -> None:
    """Lets the kernel's OOM killer choose this process first, if memory runs out faster than the guard reacts.

    The kernel chooses by resident memory, to which a GPU's allocations of unified memory do not belong: it would kill
    the desktop.
    """
    with contextlib.suppress(OSError):  # a kernel without it
        _OOM_SCORE_FILE.write_text(str(_OOM_SCORE))
