"""What the report of `vllm-spark doctor --first-run` must have, on whatever it was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_spark.errors import EXIT_WARNINGS

Report = Mapping[str, Any]

SPEED = {"rail 0", "rail 1", "rails", "two-way"}
"""Steps that may warn of a slow rail where rails are emulated, and share processors with other programs."""
STEPS = (
    *("connection", "machine", "pinning", "rail 0", "rail 1", "rails", "two-way"),
    *("packets", "payloads", "mixed", "graphs", "clearing", "healing", "pulling", "random"),
)


def assert_whole(reports: Sequence[Report], codes: Sequence[int], *, gpus: bool = False) -> None:
    """Fails the test unless all steps were run on both machines and are well; no cable was to be pulled."""
    for report, code in zip(reports, codes, strict=True):
        assert tuple(step["name"] for step in report["steps"]) == STEPS, report["reason"]
        assert code in (0, EXIT_WARNINGS), report["reason"]
        for step in report["steps"]:
            skipped = step["name"] == "pulling" or (step["name"] == "graphs" and not gpus)
            allowed = {"skipped"} if skipped else {"passed"}
            if step["name"] in SPEED:
                allowed.add("warning")
            assert step["status"] in allowed, step
    all_figures = [{step["name"]: step["figures"] for step in report["steps"]} for report in reports]
    assert all_figures[0]["random"]["digest"] == all_figures[1]["random"]["digest"]
    for figures in all_figures:
        packets, payloads = figures["packets"]["counters"], figures["payloads"]["counters"]
        assert packets["payload_messages"] == 0 < packets["packet_messages"]
        assert payloads["packet_messages"] == 0
        assert payloads["chunked_operations"] == 1
        assert figures["healing"]["counters"]["rail_recoveries"] >= 2


def failing_step(report: Report) -> dict[str, Any]:
    """The last step, which ended the run; all before it are well."""
    *before, last = report["steps"]
    assert all(step["status"] == "passed" or step["name"] in SPEED for step in before), before
    return dict(last)


def assert_named(lasts: Sequence[Mapping[str, Any]], step: str, seen: str) -> None:
    """Fails the test unless that step ended both runs, with `seen` in its finding, the meaning and the remedy."""
    assert {last["name"] for last in lasts} == {step}
    assert {last["status"] for last in lasts} <= {"failed", "stopped"}
    failed = [last for last in lasts if last["status"] == "failed"]
    assert any(seen in last["seen"] for last in failed), lasts
    assert all(last["meaning"] and last["remedy"] for last in failed)
