"""For how long a rail that fails again and again is held down."""

from __future__ import annotations

import subprocess

import pytest

from .programs import CHECKED, Programs, without_preload


def held(programs: Programs, *events: str) -> list[tuple[int, int]]:
    """Milliseconds after each failure: while another rail works, and while none does."""
    program = programs.link("hold_down.cpp", *CHECKED)
    done = subprocess.run(
        [str(program), *events], capture_output=True, text=True, timeout=60, check=True, env=without_preload()
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    return [(int(beside), int(alone)) for beside, alone in lines]


def test_it_doubles_from_one_second_to_a_minute(programs: Programs) -> None:
    times = held(programs, *(f"fail@{100 * number}" for number in range(9)))
    assert [beside for beside, _ in times] == [1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000, 60_000]


def test_while_no_rail_works_it_is_short(programs: Programs) -> None:
    times = held(programs, *(f"fail@{100 * number}" for number in range(9)))
    assert [alone for _, alone in times] == [100, 200, 400, 800, *[1000] * 5]


def test_an_outage_of_all_rails_does_not_lengthen_it(programs: Programs) -> None:
    """When it is over, the second rail that comes back is used within a second."""
    beside = [beside for beside, _ in held(programs, *(f"fail-alone@{number}" for number in range(20)))]
    assert beside == [1000] * 20
    mixed = held(programs, "fail@0", "fail@2", "fail@5", "fail-alone@6", "fail-alone@7", "fail@20")
    assert [beside for beside, _ in mixed] == [1000, 2000, 4000, 4000, 4000, 8000]


@pytest.mark.parametrize(("worked", "then"), [(59, 4000), (60, 0), (3600, 0)])
def test_a_rail_that_has_worked_for_a_minute_starts_afresh(worked: int, then: int, programs: Programs) -> None:
    events = ["fail@0", "open@10", "fail@11", "open@100", f"fail@{100 + worked}", f"fail@{101 + worked}"]
    beside = [beside for beside, _ in held(programs, *events)]
    assert beside == [1000, 2000, then, 2 * then or 1000]


def test_a_connection_that_never_opened_has_not_worked(programs: Programs) -> None:
    """However long ago the one before it had opened."""
    beside = [beside for beside, _ in held(programs, "open@0", "fail@100", "fail@200", "fail@300")]
    assert beside == [0, 1000, 2000]
