"""The errors of this project, their exit codes, and helpers for their sentences.

A `SparkError` is shown to the user as one sentence, without a traceback, and ends a command with its `exit_code`.
`upper_first`, `lower_first`, `without_stop`, `without_numbers` and `described` adapt text to such sentences.
"""

from __future__ import annotations

import re

EXIT_USAGE = 2
"""The command or its settings are invalid: nothing was started."""

EXIT_REFUSED = 3
"""The two machines do not fit together (versions, model, weights), or the leader has a follower already."""

EXIT_LOST = 4
"""The peer or the link was lost during a session."""

EXIT_WARNINGS = 5
"""`vllm-spark doctor` found warnings, and nothing worse."""

EXIT_PROBLEM = 6
"""`vllm-spark doctor` found a problem that prevents the pair from working."""


class SparkError(Exception):
    """A failure that its message explains.

    The message is one sentence with the offending value and the remedy, without a full stop: the code that shows it
    adds one. `exit_code` is the exit code of a command that it ends.
    """

    exit_code: int = 1

    def __str__(self) -> str:
        return without_stop(super().__str__())


class ConfigurationError(SparkError):
    """An invalid setting or combination of settings."""

    exit_code = EXIT_USAGE


class RefusedError(SparkError):
    """The peer was reached, but the two sides do not fit together."""

    exit_code = EXIT_REFUSED


class VersionsError(RefusedError):
    """The two machines run different versions: one of them must be reinstalled."""


class PeerLostError(SparkError):
    """The peer died, froze or became unreachable."""

    exit_code = EXIT_LOST


class PeerTimeoutError(PeerLostError):
    """The peer, which is alive, did not call an operation of both ranks in time."""


class PeerLeftError(PeerLostError):
    """The peer ended the session in order."""


class OtherSecretError(PeerLostError):
    """No peer connected, and the last one that tried has another secret; `peer` is its IP address."""

    def __init__(self, message: str, peer: str) -> None:
        super().__init__(message)
        self.peer = peer


class StoppedError(SparkError):
    """A signal ended the command; the exit code is that of a shell for the signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def upper_first(text: str) -> str:
    """`text` with its first letter in upper case; the others stay, unlike with `str.capitalize`."""
    return text[:1].upper() + text[1:]


def lower_first(text: str) -> str:
    """`text` with its first letter in lower case."""
    return text[:1].lower() + text[1:]


def without_numbers(sentence: str) -> str:
    """`sentence` without its numbers (durations, process ids), to compare the reasons of two sentences."""
    return re.sub(r"\d+", "#", sentence)


def without_stop(text: str) -> str:
    """`text` without a full stop at its end, as messages of other programs may have."""
    return text.rstrip(". \t\r\n")


def first_line(error: object) -> str:
    """The first line of an error, or of a program's output, that is not empty, without a full stop; else its type."""
    return next((without_stop(line).strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def described(error: BaseException) -> str:
    """Type and message of an error of another program, without a full stop."""
    message = without_stop(str(error))
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
