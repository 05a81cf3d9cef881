"""Faults in the middle of traffic: no bit may be wrong, nothing may hang, and a link that is gone is named."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable

import pytest

from .exercise import RAIL_SECONDS, longest_wait
from .machines import Pair
from .ranks import Outcome, Ranks

OPERATIONS = 2000
BEFORE = 300
"""Operations that are done when the fault comes."""
DURING = 200
"""Operations that the healthy rail must carry while the other one is out."""
QUICK_SECONDS = 0.5
"""The time-out of a rail in tests whose faults may come again and again."""
EMULATION_SECONDS = 1.0
"""What an operation may take besides, where two processors are emulated: without a wait for the time-out, as where the
carrier is lost, the longest took 0.13 to 0.36 s (benchmarks/NOTES.md, entry 8)."""


def assert_bounded(outcomes: tuple[Outcome, Outcome], rail_timeout: float) -> None:
    """No operation waited longer than for a rail's time-out."""
    assert longest_wait(outcome.report for outcome in outcomes) <= rail_timeout + EMULATION_SECONDS


def cut(machines: Pair, *rails: int) -> None:
    """Both ends of the cables: what happens to a cable that is pulled or breaks."""
    for rail in rails:
        for machine in machines:
            machine.rails[rail].unplug()


def mend(machines: Pair, *rails: int) -> None:
    for rail in rails:
        for machine in machines:
            machine.rails[rail].plug()


def lose_packets(machines: Pair, ranks: Ranks) -> None:
    for machine in machines:
        for rail in machine.rails:
            rail.impair("loss", "5%")


def delay_packets(machines: Pair, ranks: Ranks) -> None:
    machines[0].rails[0].impair("delay", "20ms")
    time.sleep(5)
    machines[0].rails[0].unimpair()


def pull_end(machine: int) -> Callable[[Pair, Ranks], None]:
    def fault(machines: Pair, ranks: Ranks) -> None:
        for rail in machines[machine].rails:
            rail.unplug()
        time.sleep(3)
        for rail in machines[machine].rails:
            rail.plug()

    return fault


def lose_one_rail(machines: Pair, ranks: Ranks) -> None:
    cut(machines, 1)
    ranks.carry_on(DURING)
    mend(machines, 1)


def take_one_interface_down(machines: Pair, ranks: Ranks) -> None:
    machines[0].rails[1].down()
    ranks.carry_on(DURING)
    machines[0].rails[1].up()


def lose_both_rails(machines: Pair, ranks: Ranks) -> None:
    cut(machines, 0, 1)
    time.sleep(5)
    mend(machines, 0, 1)


def break_a_queue_pair(machines: Pair, ranks: Ranks) -> None:
    ranks.commands[0].signal(signal.SIGUSR1)
    ranks.commands[0].wait_for_line("^broken$", timeout=60)


def stop_a_proxy(machines: Pair, ranks: Ranks) -> None:
    ranks.commands[1].signal(signal.SIGUSR2)
    ranks.commands[1].wait_for_line("^held$", timeout=60)


ONE_RAIL = {lose_one_rail, take_one_interface_down, break_a_queue_pair}
"""Faults that leave the other rail whole."""


@pytest.mark.parametrize(
    ("fault", "least_failures"),
    [
        pytest.param(lose_packets, 0, id="five packets of a hundred lost", marks=pytest.mark.thorough),
        pytest.param(delay_packets, 0, id="20 ms of delay", marks=pytest.mark.thorough),
        pytest.param(pull_end(0), 1, id="rank 0's cables out for 3 s"),
        pytest.param(pull_end(1), 1, id="rank 1's cables out for 3 s", marks=pytest.mark.thorough),
        pytest.param(lose_one_rail, 1, id="one rail cut"),
        pytest.param(take_one_interface_down, 1, id="one interface down", marks=pytest.mark.thorough),
        pytest.param(lose_both_rails, 2, id="both rails cut for 5 s", marks=pytest.mark.thorough),
        pytest.param(break_a_queue_pair, 1, id="a queue pair in error", marks=pytest.mark.thorough),
        pytest.param(stop_a_proxy, 0, id="a proxy stopped for 2 s", marks=pytest.mark.thorough),
    ],
)
def test_no_message_is_lost_or_wrong(
    machines: Pair, fault: Callable[[Pair, Ranks], None], least_failures: int, record_property: Callable[..., None]
) -> None:
    # A fault takes seconds, and the operations may be done before: they go on until the rail is back.
    until_back = ("--recoveries", "1") if least_failures else ()
    times = {"link_timeout_s": 60.0, "timeout_s": 120.0, "rail_timeout_s": QUICK_SECONDS}
    ranks = Ranks(machines, OPERATIONS, "--largest", "5000", *until_back, **times)
    ranks.reach(BEFORE)
    fault(machines, ranks)
    outcomes = ranks.agree()
    for outcome in outcomes:
        done = outcome.report["operations"]
        assert done >= OPERATIONS if until_back else done == OPERATIONS
        assert outcome.counters["rail_failures"] >= least_failures
        record_property("longest operation, s", outcome.report["longest"])
        record_property("machine did not run, s", outcome.report["paused"])
        if least_failures:
            assert outcome.counters["rail_recoveries"] >= 1, "the rail is back before the end"
            assert "works again, after" in outcome.output
    if fault in ONE_RAIL:
        assert_bounded(outcomes, QUICK_SECONDS)


EVERYTHING, LARGE = 0, 1600
"""Packets of more bytes than this are lost. One with an RDMA write of 4096 bytes has 4166, its acknowledgement 62."""
SECONDS = 12.0
A_BUSY_HOST = 2
"""Stalls and failures of the healthy rail that are excused: where the host stops a machine, its peer hears nothing."""


def most_attempts(outcome: Outcome) -> float:
    """Connections of a rail that is held down for 1, 2, 4 ... s after each."""
    return 2 + math.log2(outcome.report["seconds"] + 1)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("over", "both_ways"),
    [(EVERYTHING, True), (LARGE, True), (LARGE, False)],
    ids=["everything", "large packets", "large packets of one rank"],
)
def test_a_rail_that_connects_and_loses_data_is_never_used(machines: Pair, over: int, both_ways: bool) -> None:
    for machine in machines[: 1 + both_ways]:
        machine.rails[1].lose(over)
    times = {"timeout_s": 120.0, "rail_timeout_s": QUICK_SECONDS}
    ranks = Ranks(machines, OPERATIONS, "--largest", "5000", "--seconds", str(SECONDS), **times)
    outcomes = ranks.agree()
    assert_bounded(outcomes, QUICK_SECONDS)
    for outcome in outcomes:
        counters = outcome.counters
        assert counters["rail_posts"][1] == 0
        assert counters["rail_states"][1] != "open"
        assert outcome.report["stalls"] <= counters["rail_failures"] + A_BUSY_HOST
        assert 2 <= counters["rail_proof_failures"] <= most_attempts(outcome)
        assert outcome.output.count("is connected, but carries no data: no message of 4096 bytes was acknowledged") == 1


@pytest.mark.thorough
def test_a_rail_whose_other_end_is_not_found_does_not_end_the_start(machines: Pair) -> None:
    machines[1].rails[1].answer_no_arp()
    machines[0].rails[1].forget_neighbours()
    ranks = Ranks(machines, OPERATIONS, "--largest", "5000", "--seconds", str(SECONDS), timeout_s=120.0)
    first, second = ranks.agree()
    assert_bounded((first, second), RAIL_SECONDS)
    for outcome in (first, second):
        counters = outcome.counters
        assert counters["rail_posts"][1] == 0
        assert (counters["rail_states"][0], counters["rails_up"]) == ("open", 1)
        assert outcome.report["stalls"] <= most_attempts(outcome) + A_BUSY_HOST
    assert first.output.count("cannot be connected: the RDMA device rxe1 cannot reach the peer") == 1


@pytest.mark.parametrize(
    "over",
    [
        pytest.param(EVERYTHING, id="everything"),
        pytest.param(LARGE, id="large packets", marks=pytest.mark.thorough),
    ],
)
def test_a_rail_that_starts_to_lose_data_stalls_one_operation(machines: Pair, over: int) -> None:
    """From then on the healthy rail carries everything, though the other one can be connected at any time."""
    ranks = Ranks(machines, OPERATIONS, "--largest", "5000", "--seconds", str(SECONDS), timeout_s=120.0)
    ranks.reach(BEFORE)
    for machine in machines:
        machine.rails[1].lose(over)
    ranks.carry_on(DURING)
    outcomes = ranks.agree()
    assert_bounded(outcomes, RAIL_SECONDS)
    for outcome in outcomes:
        counters = outcome.counters
        assert counters["rail_failures"] >= 1
        assert counters["rail_recoveries"] < counters["rail_failures"], "rail 1 stays out of use"
        assert counters["rail_states"][1] != "open"
        assert outcome.report["stalls"] <= counters["rail_failures"] + A_BUSY_HOST
        assert counters["rail_failures"] <= 1 + 2 * A_BUSY_HOST
        assert counters["rail_proof_failures"] <= most_attempts(outcome)


def test_a_link_that_stays_down_is_given_up_by_both(machines: Pair) -> None:
    ranks = Ranks(machines, 10**6, link_timeout_s=5.0, timeout_s=120.0)
    ranks.reach(BEFORE)
    cut(machines, 0, 1)
    for rank, peer in ((0, "rank 1 on machine1"), (1, "rank 0 on machine0")):
        outcome = ranks.outcome(rank, timeout=120)
        assert outcome.exit_code == 3
        for words in (
            f"rank {rank} lost its link to {peer}: no rail came back within 5.0 s",
            "rail 0 (rxe0): ",
            "rail 1 (rxe1): ",
            "the last message posted is ",
            "see the cable and the other machine",
        ):
            assert words in outcome.error


def test_a_killed_peer_is_noticed_by_its_connection(machines: Pair) -> None:
    ranks = Ranks(machines, 10**6, link_timeout_s=60.0, timeout_s=120.0)
    ranks.reach(BEFORE)
    ranks.commands[1].kill()
    outcome = ranks.outcome(0, timeout=60)
    assert outcome.exit_code == 3
    assert "its process has ended" in outcome.error
