"""What a link does where that depends on which rank looks after its rails first: one thread drives both ranks."""

from __future__ import annotations

import subprocess

import pytest

from .programs import CHECKED, Programs

SCENARIOS = {
    "proof": "while no rail is open, the proxy does not sleep before a rail that is up is proven",
    "late": "a rail that opens after it was reported that none carries data is reported too",
    "offered": "a rail that has been offered is connected when its other end is there, held down or not",
    "reasons": "what a rank has found of a rail itself is what it says of it",
    "reason": "the sentence with which a rank stops reaches the peer whole",
    "chain": "every piece of a chain that the device refuses arrives",
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_link_step_by_step(scenario: str, programs: Programs) -> None:
    done = subprocess.run(
        [str(programs.link("link_steps.cpp", *CHECKED)), scenario],
        env={"LD_LIBRARY_PATH": str(programs.libibverbs("verbs_unreliable.cpp"))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), (SCENARIOS[scenario], done.stderr[-4000:])
