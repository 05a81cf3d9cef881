"""Both ranks of tests/rdma/exercise.py, one on each machine."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, TypedDict

from .machines import Command, Pair

BOUND = 300.0
"""Seconds in which a rank must end. It takes a fraction of that where nothing else runs."""
PORT = 29700


class Report(TypedDict, total=False):
    """The JSON object that a rank prints last; `error` only if there was one, the rest always."""

    rank: int
    error: str
    operations: int
    digest: str
    seconds: float
    longest: float
    stalls: int
    paused: float
    counters: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a rank reported: empty if it was ended before it printed its report."""

    exit_code: int
    report: Report
    output: str

    @property
    def counters(self) -> dict[str, Any]:
        return self.report["counters"]

    @property
    def error(self) -> str:
        return self.report["error"]


class Ranks:
    """Two ranks that exchange random collectives and check each."""

    def __init__(self, machines: Pair, operations: int, *arguments: str, **options: Any) -> None:
        words = ["-m", "tests.rdma.exercise"]
        self.commands: list[Command] = [
            machine.start(
                [
                    *("python", *words, str(rank), "--host", machines[0].rails[0].address, "--port", str(PORT)),
                    *("--operations", str(operations), "--options", json.dumps(options), *arguments),
                ],
                fork=True,
            )
            for rank, machine in enumerate(machines)
        ]

    def reach(self, operations: int) -> None:
        """Waits until both have done that many, a multiple of 100, from the start."""
        for command in self.commands:
            command.wait_for_line(rf"^done {operations}$", timeout=BOUND)

    def carry_on(self, operations: int) -> None:
        """Waits until both have done that many more, a multiple of 100."""
        for command in self.commands:
            done = max(map(int, re.findall(r"^done (\d+)$", command.output, re.MULTILINE)), default=0)
            command.wait_for_line(rf"^done {done + operations}$", timeout=BOUND)

    def outcome(self, rank: int, timeout: float = BOUND) -> Outcome:
        """Waits for the end of one rank."""
        finished = self.commands[rank].wait(timeout)
        last = finished.stdout.strip().splitlines()[-1]
        return Outcome(finished.exit_code, json.loads(last) if last.startswith("{") else {}, finished.output)

    def agree(self) -> tuple[Outcome, Outcome]:
        """Waits for both, which must have found every bit right and the same."""
        outcomes = self.outcome(0), self.outcome(1)
        for outcome in outcomes:
            assert outcome.exit_code == 0, outcome.output
        assert outcomes[0].report["digest"] == outcomes[1].report["digest"]
        return outcomes
