"""This project's lines in vLLM's log, and vLLM's lines about this project's failures."""

from __future__ import annotations

import logging
import sys

from vllm_spark.backend.status import engine_death, engine_ended_in_order, engine_failure
from vllm_spark.errors import SparkError

_DEAD = "EngineDeadError"
"""vLLM's error for whoever asks an engine that has ended."""

_DATE_FORMAT = "%m-%d %H:%M:%S"  # vLLM's


def log_as(program: str) -> None:
    """Logs to the standard error stream of a process that is not vLLM's, in lines that look like vLLM's."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"%(levelname)s %(asctime)s [{program}] %(message)s",
        datefmt=_DATE_FORMAT,
    )


def share_vllms_log() -> None:
    """Lets this project's messages appear like vLLM's, in its format and at its level, and shortens vLLM's own."""
    theirs = logging.getLogger("vllm")
    ours = logging.getLogger("vllm_spark")
    if theirs.handlers and not ours.handlers:
        ours.handlers, ours.propagate = theirs.handlers, False
        ours.setLevel(theirs.level)
    for handler in theirs.handlers:
        if not any(isinstance(present, _OneSentence) for present in handler.filters):
            handler.addFilter(_OneSentence())


_OF_CLIENTS = "vllm.v1.engine.async_llm"
"""The logger of what reads an engine's answers. It logs their end as a failure, also when a server is stopped."""


class _OneSentence(logging.Filter):
    """Leaves a sentence of a failure that is explained by one: vLLM logs it in each process with its traceback.

    Leaves nothing of the end of an engine that was asked to end.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, BaseException) and not logging.getLogger("vllm").isEnabledFor(logging.DEBUG):
            if record.name == _OF_CLIENTS and type(error).__name__ == _DEAD and engine_ended_in_order():
                return False
            sentence = _explanation(error)
            if sentence is not None:
                record.msg, record.args = f"{record.getMessage()} {sentence}.", ()
                record.exc_info = record.exc_text = None
        return True


def _explanation(error: BaseException) -> str | None:
    """The sentence that explains `error`, if there is one: its own, or why the pair broke, which caused it."""
    if isinstance(error, SparkError):
        return str(error)
    # vLLM raises this once its engine is dead; any other error may be about a request alone.
    failure = engine_death() if type(error).__name__ == _DEAD else engine_failure()
    return None if failure is None else str(failure)
