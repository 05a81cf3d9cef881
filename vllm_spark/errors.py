"""The errors that a user may see: one sentence, an exit code, never a traceback."""

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


def without_stop(text: str) -> str:
    """`text` as it stands within a sentence, or before a full stop: what others wrote may end in one."""
    return text.rstrip(". \t\r\n")


def described(error: BaseException) -> str:
    """Type and message of an error that was not written to stand alone, without a full stop."""
    message = without_stop(str(error))
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


EXIT_USAGE = 2
"""The command or its settings are wrong: nothing was started."""

EXIT_REFUSED = 3
"""The two machines do not fit together (version, model, weights, a follower too many)."""

EXIT_LOST = 4
"""The peer or the link went away while working together."""

EXIT_WARNINGS = 5
"""`vllm-spark doctor` found warnings, and nothing worse."""

EXIT_PROBLEM = 6
"""`vllm-spark doctor` found something that keeps the pair from working."""


class SparkError(Exception):
    """A failure that is explained by its message alone.

    The message is one sentence that names the offending value and the remedy. `exit_code` is what a
    command line returns for it. Whoever shows the message adds a full stop: it has none, also if it ends in the words
    of another program.
    """

    exit_code: int = 1

    def __str__(self) -> str:
        return without_stop(super().__str__())


class ConfigurationError(SparkError):
    """A setting, or a combination of settings, that cannot work."""

    exit_code = EXIT_USAGE


class RefusedError(SparkError):
    """The peer was reached, but the two sides do not fit together."""

    exit_code = EXIT_REFUSED


class VersionsError(RefusedError):
    """The two machines run other versions: they cannot work together until one of them is installed anew."""


class PeerLostError(SparkError):
    """The peer died, froze or became unreachable."""

    exit_code = EXIT_LOST


class PeerLeftError(PeerLostError):
    """The peer said goodbye: it was stopped in good order."""


class StoppedError(SparkError):
    """A signal ended the work; the exit code is a shell's for that signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
