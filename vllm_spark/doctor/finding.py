"""The result of a check: what was checked, its status, why it matters, and the remedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, get_args

from vllm_spark.errors import EXIT_PROBLEM, EXIT_WARNINGS, described

Status = Literal["ok", "not applicable", "note", "unknown", "warning", "problem"]
"""From best to worst. A problem prevents the pair from working; only warnings and problems change the exit code."""

_SEVERITY = {status: severity for severity, status in enumerate(get_args(Status))}


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        id: `area.name`, the same in every report.
        title: what was checked.
        status: see `Status`.
        value: what was measured.
        explanation: why it matters; empty if all is well.
        remedy: what to do, with each command on a line of its own; empty if nothing has to be done.
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
    """The findings of `check`, or a finding that it failed.

    A check that fails on an unexpected machine must not prevent the others.

    Args:
        name: id of the finding that reports the failure.
    """
    try:
        yield from check()
    except Exception as error:
        yield Finding(
            name,
            "A check that failed",
            "unknown",
            described(error),
            "The check does not support something on this machine; please report it.",
        )
