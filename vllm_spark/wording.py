"""Sentences that are put together from parts, some of which begin one and some of which stand within."""

from __future__ import annotations

import re


def upper_first(text: str) -> str:
    """`text` as the beginning of a sentence: names in it keep their letters, which `str.capitalize` makes small."""
    return text[:1].upper() + text[1:]


def lower_first(text: str) -> str:
    """`text` as it stands within a sentence."""
    return text[:1].lower() + text[1:]


def without_stop(text: str) -> str:
    """`text` as it stands within a sentence, or before a full stop: what others wrote may end in one."""
    return text.rstrip(". \t\r\n")


def described(error: BaseException) -> str:
    """Type and message of an error that was not written to stand alone, without a full stop."""
    message = without_stop(str(error))
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def without_numbers(sentence: str) -> str:
    """To see whether two sentences give the same reason: durations and process ids in them change."""
    return re.sub(r"\d+", "#", sentence)
