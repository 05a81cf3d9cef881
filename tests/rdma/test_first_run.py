"""`vllm-spark doctor --first-run` between both machines: the real command, over real queue pairs of soft-RoCE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.first_run_report import assert_named, assert_whole, failing_step
from vllm_spark.errors import EXIT_PROBLEM

from .machines import Command, Pair

BOUND = 3000.0
"""Nearly all of it is emulation, and imports: some ten minutes on an idle machine."""
SECRET = "the secret of both machines"
ENVIRONMENT = {"VLLMSPARK_SECRET": SECRET, "VLLMSPARK_RAIL_TIMEOUT": "4"}
"""A busy host stops an emulated machine for longer than a rail's default time-out."""
LARGE = 1600
"""Packets of more bytes are lost: those with RDMA writes."""


class FirstRun:
    """Both sides of it."""

    def __init__(self, machines: Pair) -> None:
        address = machines[0].rails[0].address
        sides = (("--listen", "--address", address, "--collectives", "100"), ("--connect", address))
        self._reports: list[Path] = []
        self._commands: list[Command] = []
        for machine, side in zip(machines, sides, strict=True):
            report = machine.shared / f"first-run-{machine.index}.json"
            report.unlink(missing_ok=True)
            words = ["doctor", "--first-run", "--wait", "600", "--report", str(report), *side]
            self._reports.append(report)
            self._commands.append(machine.start(["python", "-m", "vllm_spark", *words], ENVIRONMENT))

    def ended(self) -> tuple[list[dict[str, Any]], list[int]]:
        """Both reports and exit codes."""
        finished = [command.wait(BOUND) for command in self._commands]
        for each in finished:
            assert "Traceback" not in each.output
        texts = [report.read_text() for report in self._reports]
        assert not any(SECRET in text for text in texts)
        return [json.loads(text) for text in texts], [each.exit_code for each in finished]


@pytest.mark.thorough
@pytest.mark.timeout(2 * BOUND)
def test_it_passes_whole(machines: Pair) -> None:
    reports, codes = FirstRun(machines).ended()
    assert_whole(reports, codes)
    assert [report["steps"][0]["status"] for report in reports] == ["passed", "passed"]


@pytest.mark.thorough
@pytest.mark.timeout(2 * BOUND)
def test_a_rail_that_loses_large_packets_is_named_by_its_step(machines: Pair) -> None:
    for machine in machines:
        machine.rails[1].lose(LARGE)
    reports, codes = FirstRun(machines).ended()
    assert codes == [EXIT_PROBLEM, EXIT_PROBLEM]
    assert_named(
        [failing_step(report) for report in reports], "rail 1", "carried writes of 64 bytes and none of 262144"
    )
