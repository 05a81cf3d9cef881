"""Collectives over real queue pairs: every result is compared to the last bit, on both machines."""

from __future__ import annotations

import os

import pytest

from tests.thorough import examples

from .machines import Pair
from .ranks import Ranks

OPERATIONS = int(os.environ.get("VLLMSPARK_RDMA_OPERATIONS", examples(1500, 3000)))
"""For a release, 20000: some three minutes."""
KIB, MIB = 1 << 10, 1 << 20


def test_many_collectives_of_random_kind_dtype_and_size(machines: Pair) -> None:
    for outcome in Ranks(machines, OPERATIONS).agree():
        assert outcome.report["operations"] == OPERATIONS
        counters = outcome.counters
        # A rail may fail without a fault: where the host stops a machine for half a second, its peer hears no answer.
        assert counters["rails_up"] >= 1
        if counters["rail_failures"] == 0:
            assert min(counters["rail_bytes"][:2]) > 0.45 * sum(counters["rail_bytes"]), "both rails carry their share"
        assert counters["packet_messages"] > 0
        assert counters["payload_messages"] > 0


@pytest.mark.parametrize(
    "largest", [700 * KIB, pytest.param(16 * MIB, marks=pytest.mark.thorough)], ids=["2.7 MiB", "64 MiB"]
)
def test_messages_from_nothing_to_large_ones(machines: Pair, largest: int) -> None:
    """The two largest go in chunks; elements are of four bytes."""
    sizes = [0, 1, 2, 3, 1023, 2048, 2049, 64 * KIB + 1, largest]
    ranks = Ranks(machines, len(sizes), "--largest", "100000", "--elements", *map(str, sizes))
    for outcome in ranks.agree():
        assert outcome.report["operations"] == len(sizes)
        assert outcome.counters["chunked_operations"] >= 2


@pytest.mark.parametrize("rail", [pytest.param(0, marks=pytest.mark.thorough), 1])
def test_either_rail_alone(machines: Pair, rail: int) -> None:
    for outcome in Ranks(machines, 400, rails=[f"rxe{rail}:1"]).agree():
        assert outcome.counters["rails_up"] == 1
        assert outcome.counters["rail_posts"][1:] == [0, 0, 0]
        assert f"connected over verbs on rail 0 (rxe{rail})\n" in outcome.output


def test_ranks_that_differ_are_told_in_what(machines: Pair) -> None:
    ranks = Ranks(machines, 1, rails=["rxe7"])
    for rank in (0, 1):
        finished = ranks.commands[rank].wait(120)
        assert finished.exit_code == 1
        assert "there is no RDMA port rxe7:1; this machine has rxe0:1, rxe1:1" in finished.output
