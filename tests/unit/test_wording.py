"""Sentences that are put together."""

from __future__ import annotations

import pytest

from vllm_spark.errors import (
    EXIT_LOST,
    PeerLostError,
    SparkError,
    described,
    first_line,
    lower_first,
    upper_first,
    without_stop,
)


@pytest.mark.parametrize(
    ("text", "upper", "lower"),
    [
        ("", "", ""),
        ("the GPU of Desk-2", "The GPU of Desk-2", "the GPU of Desk-2"),
        ("Éa", "Éa", "éa"),
        ("5", "5", "5"),
    ],
)
def test_only_the_first_letter_changes(text: str, upper: str, lower: str) -> None:
    assert (upper_first(text), lower_first(text)) == (upper, lower)


@pytest.mark.parametrize("text", ["it failed", "it failed.", "it failed. ", "it failed...\n", "it failed.\r\n"])
def test_one_full_stop_is_added_and_no_second(text: str) -> None:
    """Whatever wrote the last words: vLLM, torch, pydantic and OpenSSL each have their own habit."""
    assert without_stop(text) == "it failed"
    assert f"{SparkError(text)}." == "it failed."
    assert f"{PeerLostError(f'{SparkError(text)}; start it again')}." == "it failed; start it again."
    assert described(ValueError(text)) == "ValueError: it failed"


@pytest.mark.parametrize("text", ["it failed", "it failed.\nsee above", "\n  it failed. \n", "it failed\r\nagain"])
def test_the_first_line_that_is_not_empty(text: str) -> None:
    assert first_line(ValueError(text)) == first_line(text) == "it failed"


def test_an_error_without_a_message_is_its_type() -> None:
    assert first_line(ValueError(" \n")) == "ValueError"
    assert described(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert described(AssertionError("")) == "AssertionError"


def test_an_error_keeps_what_it_was_made_of() -> None:
    error = PeerLostError("gone.")
    assert (error.args, error.exit_code) == (("gone.",), EXIT_LOST)
