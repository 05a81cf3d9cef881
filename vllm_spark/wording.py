"""Sentences that are put together from parts, some of which begin one and some of which stand within."""

from __future__ import annotations

import re


def upper_first(text: str) -> str:
    """`text` as the beginning of a sentence: names in it keep their letters, which `str.capitalize` makes small."""
    return text[:1].upper() + text[1:]


def lower_first(text: str) -> str:
    """`text` as it stands within a sentence."""
    return text[:1].lower() + text[1:]


def without_numbers(sentence: str) -> str:
    """To see whether two sentences give the same reason: durations and process ids in them change."""
    return re.sub(r"\d+", "#", sentence)
