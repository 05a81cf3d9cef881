"""A machine that is gone; the last test of this folder, since the next one would wait until it has booted again."""

from __future__ import annotations

import pytest

from .machines import Pair
from .ranks import Ranks
from .test_faults import BEFORE


@pytest.mark.thorough
def test_a_killed_machine_is_noticed_by_the_link(machines: Pair) -> None:
    ranks = Ranks(machines, 10**6, link_timeout_s=5.0, timeout_s=120.0)
    ranks.reach(BEFORE)
    machines[1].kill()
    outcome = ranks.outcome(0, timeout=120)
    assert outcome.exit_code == 3
    assert "rank 0 lost its link to rank 1 on machine1: no rail came back within 5.0 s" in outcome.error
