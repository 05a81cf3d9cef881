"""Another implementation of the protocol, with pyverbs: it gets along with ours, and gets nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .machines import Pair

PORT = 29710
BOUND = 300.0
PYTHON = "/usr/bin/python3"
"""Debian's own, for which its pyverbs was built."""
REMOTE_ACCESS_ERROR = "ended with status 10"
ATTACKS = ("wrong-key", "outside", "stale-key")


def run_both(machines: Pair, operations: int, *attacks: str) -> tuple[dict[str, int], str]:
    """What our rank reports, and what the stranger printed."""
    host = machines[0].rails[0].address
    rounds = [str(operations), *("20" for _ in attacks)]
    ours = machines[0].start(["python", "-m", "tests.rdma.host_of_stranger", host, str(PORT), *rounds])
    script = str(Path(__file__).with_name("stranger.py"))
    theirs = machines[1].start([PYTHON, script, host, str(PORT), str(operations), *attacks])
    printed = theirs.wait(BOUND)
    assert printed.exit_code == 0, printed.output
    finished = ours.wait(BOUND)
    assert finished.exit_code == 0, finished.output
    return json.loads(finished.stdout.splitlines()[-1]), printed.stdout


@pytest.mark.thorough
def test_an_independent_rank_of_pyverbs_takes_part(machines: Pair) -> None:
    report, printed = run_both(machines, 100)
    assert printed == "100 operations were right\n"
    assert report["done"] == 100
    assert report["failures"] == report["recoveries"]


def test_a_peer_reaches_what_it_shall_and_nothing_else(machines: Pair) -> None:
    """A wrong key, the control words before the receiving part, and the key of an earlier connection."""
    report, printed = run_both(machines, 10, *ATTACKS)
    for attack in ATTACKS:
        line = next(line for line in printed.splitlines() if line.startswith(f"{attack}: "))
        assert line.endswith(REMOTE_ACCESS_ERROR), line
        assert f"{attack}: 20 operations after it were right\n" in printed
    assert report["done"] == 70
    assert report["failures"] >= len(ATTACKS), "a rail may also fail because a busy host stops a machine"
    assert report["failures"] == report["recoveries"]
