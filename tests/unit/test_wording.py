"""Sentences that are put together."""

from __future__ import annotations

import pytest

from vllm_spark.wording import lower_first, upper_first


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
