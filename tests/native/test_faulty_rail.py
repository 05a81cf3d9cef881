"""A rail whose connections come up and then lose what is sent, or that cannot be connected, beside a healthy one.

Nothing here says how fast anything is: what is counted is operations that took as long as the faulty rail repeats a
packet, and connections of that rail. Real queue pairs are in tests/rdma.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from .programs import CHECKED, SANITIZERS, Programs

SECONDS = 8.0
RETRY_MS = 700
FAULTY = 1
"""The rail that is memory1; rail 0 is healthy."""

FAULTS = {
    "carries nothing": {"LOSE_OVER": "-1"},
    "drops large packets": {"LOSE_OVER": "1500"},
    "drops what one rank sends": {"LOSE_OVER": "-1", "LOSE_ONE_WAY": "1"},
    "drops large packets one way": {"LOSE_OVER": "1500", "LOSE_ONE_WAY": "1"},
}
FAILS_SOON = {"LOSE_FROM": "50"}


@dataclass(frozen=True)
class Course:
    """What a run of the program printed."""

    report: dict[str, Any]
    log: str

    @property
    def ranks(self) -> list[dict[str, Any]]:
        return [self.report["left"], self.report["right"]]

    @property
    def most_connections(self) -> float:
        """Connections of a rail that is held down for 1, 2, 4 ... s: both ends' first, and one after each time."""
        return 2 * (2 + math.log2(self.report["seconds"] + 1))


def run(programs: Programs, *arguments: object, faults: Mapping[str, str], flags: tuple[str, ...] = CHECKED) -> Course:
    done = start(programs, *arguments, faults={"FAULTY_DEVICE": "memory1", **faults}, flags=flags)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    print(done.stdout, done.stderr)
    return Course(json.loads(done.stdout), done.stderr)


def start(
    programs: Programs, *arguments: object, faults: Mapping[str, str], flags: tuple[str, ...] = CHECKED
) -> subprocess.CompletedProcess[str]:
    program = programs.link("faulty_rail.cpp", *flags)
    return subprocess.run(
        [str(program), *map(str, arguments)],
        env={
            "LD_LIBRARY_PATH": str(programs.libibverbs("verbs_unreliable.cpp")),
            "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
            "RETRY_MS": str(RETRY_MS),
            **faults,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


PROBLEM = (
    r"(transport retry counter exceeded \(status 12, vendor error 0x81, queue pair \d+ to \d+, GID index 0\)"
    r"|its other end failed)"
)
A_BUSY_MACHINE = 2
"""Stalls that the machine may add: it runs other programs for longer than a stall lasts. The old code had 12."""


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=pytest.mark.thorough) if fault == "drops large packets one way" else fault
        for fault in FAULTS
    ],
)
def test_a_rail_that_connects_and_loses_data_is_never_used(fault: str, programs: Programs) -> None:
    course = run(programs, SECONDS, faults=FAULTS[fault])
    assert course.report["errors"] == ["", ""]
    for rank in course.ranks:
        assert rank["posts"][FAULTY] == 0, "no data before a full-size message was acknowledged, at both ends"
        assert rank["reposts"] == 0
        assert rank["stalls"] <= A_BUSY_MACHINE, "no operation waited for the faulty rail"
        assert rank["rails_up"] == 1
    assert course.report["operations"] > 100
    assert 2 <= course.report["connections"]["memory1"] <= course.most_connections
    assert course.report["connections"]["memory0"] == 2, "the healthy rail never failed"
    # Once for each rank and not once for each attempt.
    told = re.findall(r"rail 1 \(memory1\) to rank \d on \w+ is connected, but carries no data: .*", course.log)
    assert len(told) == 2, course.log


def test_a_rail_that_fails_soon_after_it_came_up_is_held_down(programs: Programs) -> None:
    """It passes the proof, takes messages and loses one: each time, but ever more seldom."""
    course = run(programs, SECONDS, faults=FAILS_SOON)
    assert course.report["errors"] == ["", ""]
    for rank in course.ranks:
        assert 0 < rank["posts"][FAULTY] <= 50 * course.most_connections
        assert 0 < rank["failures"] <= course.most_connections / 2
        # Both ranks stop for a lost message of either, and what went again came over the healthy rail.
        assert rank["stalls"] <= sum(each["failures"] for each in course.ranks) + A_BUSY_MACHINE
    assert course.report["connections"]["memory1"] <= course.most_connections
    assert "held down for 1.0 s" in course.log
    assert "held down for 2.0 s" in course.log


def test_a_rail_that_heals_is_used_again(programs: Programs) -> None:
    course = run(programs, 12.0, 2.5, faults={"LOSE_OVER": "-1"})
    assert course.report["errors"] == ["", ""]
    for rank in course.ranks:
        assert rank["rails_up"] == 2
        assert rank["posts"][FAULTY] > 0
        assert rank["failures"] == rank["recoveries"] == 0, "it had never carried data"
        assert rank["stalls"] <= A_BUSY_MACHINE
    assert len(re.findall(r"rail 1 \(memory1\) to rank \d on \w+ carries data now, after \d+\.\d s", course.log)) == 2


@pytest.mark.parametrize("fault", ["carries nothing", "drops large packets"])
def test_a_link_of_which_no_rail_carries_data_is_given_up_by_name(fault: str, programs: Programs) -> None:
    course = run(programs, SECONDS, 1000, 3, faults={"FAULTY_DEVICE": "both", **FAULTS[fault]})
    peers = ("rank 1 on right", "rank 0 on left")
    for error in course.report["errors"]:
        rank = 0 if "rank 0 has no link" in error else 1  # the other one, if it was first and told this one
        assert f"rank {rank} has no link to {peers[rank]}: no rail has carried a message of 4096 bytes" in error
        assert " within 3.0 s (" in error
        for rail in (0, 1):
            assert re.search(rf"rail {rail} \(memory{rail}\): {PROBLEM}", error), error
        assert error.endswith("; see cables, addresses and MTU with vllm-spark doctor --peer"), error


def test_of_four_lost_rails_each_is_named_and_the_remedy_too(programs: Programs) -> None:
    course = run(programs, SECONDS, 1000, 3, 4, faults={"FAULTY_DEVICE": "both", "LOSE_OVER": "-1"})
    for error in course.report["errors"]:
        for rail in range(4):
            assert re.search(rf"rail {rail} \(memory{rail % 2}\): {PROBLEM}", error), error
        assert error.endswith("; see cables, addresses and MTU with vllm-spark doctor --peer"), error


REFUSAL = "cannot be connected: the RDMA device memory1 cannot reach the peer (Connection timed out); "


def test_a_rail_that_cannot_be_connected_does_not_end_the_start(programs: Programs) -> None:
    course = run(programs, SECONDS, faults={"REFUSE_CONNECT": "memory1"})
    assert course.report["errors"] == ["", ""]
    for rank in course.ranks:
        assert (rank["posts"][FAULTY], rank["rails_up"], rank["reposts"]) == (0, 1, 0)
        assert rank["states"][0] == "open"
    assert course.report["operations"] > 100
    assert course.report["connections"] == {"memory0": 2, "memory1": 0}
    # The later one to offer the rail finds that it cannot be connected, and waits; the other one waits for it.
    assert any(rank["states"][FAULTY] == "held down" for rank in course.ranks)
    assert course.log.count(REFUSAL) == 2, "once for each rank"


def test_a_rail_that_can_be_connected_again_is_used(programs: Programs) -> None:
    course = run(programs, 8.0, 2.0, faults={"REFUSE_CONNECT": "memory1"})
    assert course.report["errors"] == ["", ""]
    for rank in course.ranks:
        assert rank["rails_up"] == 2
        assert rank["posts"][FAULTY] > 0
    assert len(re.findall(r"rail 1 \(memory1\) to rank \d on \w+ carries data now, after \d+\.\d s", course.log)) == 2


def test_a_start_without_any_rail_ends_in_a_sentence(programs: Programs) -> None:
    done = start(programs, SECONDS, faults={"REFUSE_CONNECT": "both"})
    assert done.returncode == 3, (done.returncode, done.stderr)
    device = "the RDMA device memory{0} cannot reach the peer (Connection timed out)"
    assert done.stdout.startswith("rank 0 has no link to rank 1 on right: no rail can be connected (rail 0 (memory0): ")
    for rail in (0, 1):
        assert f"rail {rail} (memory{rail}): {device.format(rail)}" in done.stdout
    assert done.stdout.endswith("); see cables and addresses with vllm-spark doctor --peer\n")


@pytest.mark.parametrize(
    "fault",
    [FAULTS["drops large packets"], FAILS_SOON, {"REFUSE_CONNECT": "memory1"}],
    ids=["drops large packets", "fails soon", "cannot be connected"],
)
def test_a_faulty_rail_under_thread_sanitizer(fault: dict[str, str], programs: Programs) -> None:
    """All others of this file run under the address and undefined-behaviour sanitizers."""
    course = run(programs, 4.0, faults=fault, flags=SANITIZERS["thread"])
    assert course.report["errors"] == ["", ""]
    assert course.report["connections"]["memory1"] <= course.most_connections
