"""The results of steps: what was measured, and for a failure what was seen, what it means, and the remedy."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from vllm_spark.errors import EXIT_PROBLEM, SparkError, without_stop

Status = Literal["passed", "warning", "failed", "skipped", "stopped"]
"""A failed step ends the run on both machines; `stopped` is one that the other machine, or a signal, ended."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """What a fault means, and its remedy; each without a full stop."""

    meaning: str
    remedy: str


class StepFailedError(SparkError):
    """A step has failed on this machine.

    Args:
        seen: what was seen.
        advice: what that means, and the remedy.
    """

    exit_code = EXIT_PROBLEM

    def __init__(self, seen: str, advice: Advice) -> None:
        self.seen, self.advice = without_stop(seen), advice
        super().__init__(sentence(self.seen, advice))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a step that did not fail found.

    Attributes:
        value: its figure, for the line that is printed.
        figures: all of them, for the report; names end in their units.
        warning: what was seen that should be better; empty if all is well.
        advice: what the warning means, and the remedy.
        skipped: whether the step does not apply here; `value` has the reason.
    """

    value: str
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    warning: str = ""
    advice: Advice | None = None
    skipped: bool = False


@dataclasses.dataclass(frozen=True)
class StepResult:
    """One step of the report."""

    name: str
    title: str
    status: Status
    seconds: float
    value: str = ""
    seen: str = ""
    meaning: str = ""
    remedy: str = ""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """What was seen, what it means and the remedy; empty if all is well."""
        if not self.seen:
            return ""
        return sentence(self.seen, Advice(self.meaning, self.remedy) if self.meaning else None)


def sentence(seen: str, advice: Advice | None) -> str:
    """One sentence without a full stop."""
    return seen if advice is None else f"{seen}: {advice.meaning}; {advice.remedy}"
