"""Logging: this project's messages in vLLM's log, and vLLM's messages about this project's failures."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from vllm_spark.backend.status import SERVER_STOPPED, engine_death, engine_ended_on_request, engine_failure
from vllm_spark.errors import SparkError

_ENGINE_DEAD = "EngineDeadError"
"""vLLM's error for calls of an engine that has ended."""

_DATE_FORMAT = "%m-%d %H:%M:%S"  # vLLM's


def log_as(program: str) -> None:
    """Configures logging to stderr in a process that is not vLLM's, in the format of vLLM's lines."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"%(levelname)s %(asctime)s [{program}] %(message)s",
        datefmt=_DATE_FORMAT,
    )


def use_vllm_logging() -> None:
    """Logs this project's messages with vLLM's handlers and level, and shortens vLLM's tracebacks of known failures."""
    theirs = logging.getLogger("vllm")
    ours = logging.getLogger("vllm_spark")
    if theirs.handlers and not ours.handlers:
        ours.handlers, ours.propagate = theirs.handlers, False
        ours.setLevel(theirs.level)
    for handler in theirs.handlers:
        if not any(isinstance(present, _ShortenTraceback) for present in handler.filters):
            handler.addFilter(_ShortenTraceback())


_CLIENT_LOGGER = "vllm.v1.engine.async_llm"
"""The logger of vLLM's output handler, which logs the end of an engine as a failure even if a server is stopped."""


_CPU_COMMUNICATOR_LOGGER = "vllm.distributed.device_communicators.cpu_communicator"


@contextlib.contextmanager
def without_fallback_notice() -> Iterator[None]:
    """Drops vLLM's line that a group falls back to torch.distributed, if that is logged in the body.

    For groups whose collectives this project runs: the line is not true of them, and reads like a failed start.
    """
    logger = logging.getLogger(_CPU_COMMUNICATOR_LOGGER)
    drop = _DropFallbackNotice()
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


class _DropFallbackNotice(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "falling back to torch.distributed" not in str(record.msg)


class _ShortenTraceback(logging.Filter):
    """Replaces the traceback of a failure by the sentence that explains it: vLLM logs one in each process.

    Drops the record if the engine ended because it was asked to.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, BaseException) and not logging.getLogger("vllm").isEnabledFor(logging.DEBUG):
            if record.name == _CLIENT_LOGGER and type(error).__name__ == _ENGINE_DEAD and engine_ended_on_request():
                return False
            sentence = _explanation(error)
            if sentence is not None:
                record.msg, record.args = f"{record.getMessage()} {sentence}.", ()
                record.exc_info = record.exc_text = None
        return True


def _explanation(error: BaseException) -> str | None:
    """The sentence that explains `error`: its own, or the failure of the session that caused it; None without one."""
    if isinstance(error, SparkError):
        return str(error)
    # vLLM raises this once its engine is dead; any other error may be about a request alone.
    if type(error).__name__ == _ENGINE_DEAD and engine_ended_on_request():
        return SERVER_STOPPED
    failure = engine_death() if type(error).__name__ == _ENGINE_DEAD else engine_failure()
    return None if failure is None else str(failure)
