"""What a check found: one thing that was looked at, how it is, why that matters, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, get_args

import msgspec

from vllm_spark.errors import EXIT_PROBLEM, EXIT_WARNINGS, described

Status = Literal["ok", "not applicable", "note", "unknown", "warning", "problem"]
"""From best to worst. Only a problem keeps the pair from working; only warnings and problems change an exit code."""

_SEVERITY = {status: severity for severity, status in enumerate(get_args(Status))}


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at.

    Attributes:
        id: `area.name`, the same in every report.
        title: what was looked at, in words.
        status: how it is.
        value: what was measured.
        explanation: why it matters; empty where all is well.
        remedy: what to do about it, commands on lines of their own; empty where there is nothing to do.
    """

    id: str
    title: str
    status: Status
    value: str = ""
    explanation: str = ""
    remedy: str = ""

    @property
    def area(self) -> str:
        """The first part of the id."""
        return self.id.partition(".")[0]


def worst(findings: Iterable[Finding]) -> Status:
    """The worst status of all; `ok` if there is none."""
    return max((finding.status for finding in findings), key=_SEVERITY.__getitem__, default="ok")


def exit_code(status: Status) -> int:
    """EXIT_PROBLEM for a problem, EXIT_WARNINGS for a warning, 0 for anything better: no code that an error has."""
    codes: dict[Status, int] = {"problem": EXIT_PROBLEM, "warning": EXIT_WARNINGS}
    return codes.get(status, 0)


def guarded(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What `check` finds, and that it failed if it did.

    Machines differ from what a check expects in ways that nobody thought of: then the others still count.

    Args:
        name: id of the finding that says so.
    """
    try:
        yield from check()
    except Exception as error:
        yield Finding(
            name,
            "A check that failed",
            "unknown",
            described(error),
            "The check met something on this machine that it was not written for; please report it.",
        )
