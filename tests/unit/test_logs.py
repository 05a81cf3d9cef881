"""vLLM's tracebacks about failures that a sentence explains."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest

from vllm_spark.backend.logging import use_vllm_logging, without_fallback_notice
from vllm_spark.backend.status import EngineStatus
from vllm_spark.compat.patching import ANNOUNCED
from vllm_spark.errors import PeerLostError


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the logger `vllm` prints, as `use_vllm_logging` arranges it."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("vllm_spark")
    for logger in (theirs, ours):
        monkeypatch.setattr(logger, "handlers", [])
        monkeypatch.setattr(logger, "propagate", False)
        monkeypatch.setattr(logger, "level", logging.INFO)
    theirs.handlers.append(handler)
    monkeypatch.setenv(ANNOUNCED, "")
    use_vllm_logging()
    use_vllm_logging()
    return text


def fail(error: Exception) -> None:
    try:
        raise error
    except Exception:
        logging.getLogger("vllm").exception("It failed after %d s.", 3)


def test_a_failure_of_ours_is_one_line(log: io.StringIO) -> None:
    fail(PeerLostError("the follower is gone; start it"))
    assert log.getvalue() == "It failed after 3 s. the follower is gone; start it.\n"


def test_other_failures_keep_their_traceback(log: io.StringIO) -> None:
    fail(RuntimeError("a bug"))
    assert "Traceback" in log.getvalue()


def test_once_the_pair_is_broken_all_is_explained_by_that(log: io.StringIO) -> None:
    EngineStatus.create().fail(PeerLostError("the follower is gone"))
    fail(RuntimeError("a symptom"))
    assert log.getvalue() == "It failed after 3 s. the follower is gone.\n"


def test_debugging_shows_everything(log: io.StringIO) -> None:
    logging.getLogger("vllm").setLevel(logging.DEBUG)
    fail(PeerLostError("the follower is gone"))
    assert "Traceback" in log.getvalue()


class EngineDeadError(Exception):
    """Of vLLM, as far as its name goes."""


def fail_to_read(error: Exception) -> None:
    try:
        raise error
    except Exception:
        logging.getLogger("vllm.v1.engine.async_llm").exception("AsyncLLM output_handler failed.")


def test_the_end_of_an_engine_that_was_stopped_is_no_failure(log: io.StringIO) -> None:
    status = EngineStatus.create()
    status.mark_started()
    status.mark_ended(clean=True)
    fail_to_read(EngineDeadError("EngineCore encountered an issue. See stack trace (above) for the root cause."))
    assert log.getvalue() == ""
    fail_to_read(RuntimeError("a bug"))
    assert "RuntimeError: a bug" in log.getvalue()


def test_requests_of_a_stopped_server_end_with_that_reason(log: io.StringIO) -> None:
    status = EngineStatus.create()
    status.mark_started()
    status.mark_stop_requested()
    try:
        raise EngineDeadError("EngineCore encountered an issue.")
    except EngineDeadError:
        logging.getLogger("vllm.entrypoints.openai.completion.serving").exception("Error in a stream.")
    assert "Error in a stream. the server was stopped." in log.getvalue()
    assert "Traceback" not in log.getvalue()


@pytest.mark.parametrize("engine", ["at work", "failed", "started again"])
def test_any_other_end_of_an_engine_is_one(log: io.StringIO, engine: str) -> None:
    status = EngineStatus.create()
    status.mark_started()
    if engine != "at work":
        status.mark_ended(clean=engine == "started again")
    if engine == "started again":
        status.mark_started()
    fail_to_read(EngineDeadError("EngineCore encountered an issue. See stack trace (above) for the root cause."))
    assert "AsyncLLM output_handler failed" in log.getvalue()
    assert "Traceback" in log.getvalue()


def test_a_group_that_does_not_fall_back_has_no_notice_of_it(log: io.StringIO) -> None:
    """vLLM's words, as the installed version has them."""
    communicator = pytest.importorskip("vllm.distributed.device_communicators.cpu_communicator")
    notice = "falling back to torch.distributed"
    assert notice in " ".join(Path(communicator.__file__).read_text().split()).replace('" "', "")
    theirs = logging.getLogger(communicator.__name__)
    with without_fallback_notice():
        theirs.info("CPU SHM communicator disabled for group %s: no name, falling back to torch.distributed.", "tp:0")
        theirs.info("Another line.")
    assert log.getvalue() == "Another line.\n"
    theirs.info("CPU SHM communicator disabled for group %s: no name, falling back to torch.distributed.", "tp:0")
    assert notice in log.getvalue()
