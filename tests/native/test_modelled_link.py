"""The loopback transport over a modelled link: the rails, and the time that the model prescribes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch

from vllm_spark.collective import Runtime
from vllm_spark.collective.link_model import PUBLISHED_FIGURES, WireFigures

from .pair import BOUND, Pipe, connect, run_pair

MODELLED = {"loopback_mode": "proxied", "wire": PUBLISHED_FIGURES}
LARGE = torch.arange(1 << 16, dtype=torch.float32)
"""Two stripes of 128 KiB."""


def reduce_once(runtime: Runtime) -> None:
    assert torch.equal(runtime.all_reduce(LARGE + runtime.rank), 2 * LARGE + 1)


def over_both_rails(rank: int, exchange: Pipe) -> None:
    with connect(rank, exchange, **MODELLED) as runtime:
        for _ in range(50):
            reduce_once(runtime)
        exchange(b"received")  # so all of this rank's messages have been posted
        counters = runtime.counters()
        assert (counters.rails_up, counters.rail_states) == (2, ("open", "open"))
        assert all(posts > 0 for posts in counters.rail_posts[:2]), counters.rail_posts
        assert sum(counters.rail_posts) == 100, "two stripes for each message"
        exchange(b"done")


def a_thousand_messages(rank: int, exchange: Pipe) -> None:
    """Of one chunk each, or of some: without a pattern that suits the number of rails."""
    sizes = random.Random(7).choices((5, 700, 1024, 1025, 5000, 20_000, 70_001), k=1000)
    with connect(rank, exchange, **MODELLED) as runtime:
        while runtime.counters().rails_up < 2:
            time.sleep(0.001)
        exchange(b"both rails are open")
        for size in sizes:
            runtime.all_reduce(LARGE[:1].expand(size))
        exchange(b"received")
        counters = runtime.counters()
        carried = counters.rail_bytes[:2]
        assert min(carried) > 0.45 * sum(carried), counters
        assert min(counters.rail_posts[:2]) > 0.2 * sum(counters.rail_posts), counters
        assert 0 < sum(counters.rail_doorbells) <= sum(counters.rail_posts), counters
        exchange(b"done")


@pytest.mark.parametrize("body", [over_both_rails, a_thousand_messages])
def test_messages_take_both_rails(body: Callable[[int, Pipe], None]) -> None:
    for outcome in run_pair(body):
        assert outcome.error is None, outcome


def over_a_rail_that_breaks(rank: int, exchange: Pipe) -> None:
    with connect(rank, exchange, **MODELLED) as runtime:
        reduce_once(runtime)
        if rank == 0:
            runtime._native.break_rail(1)
        end = time.monotonic() + BOUND / 2
        healed = theirs_healed = False
        while not (healed and theirs_healed):  # both stop after the same operation
            assert time.monotonic() < end, runtime.counters()
            for _ in range(20):
                reduce_once(runtime)
            counters = runtime.counters()
            healed = counters.rail_recoveries == 1 and counters.rail_states == ("open", "open")
            theirs_healed = exchange(str(healed).encode()) == b"True"
        reduce_once(runtime)
        assert runtime.counters().rail_failures == 1
        exchange(b"done")


def test_a_rail_that_breaks_is_connected_again() -> None:
    for outcome in run_pair(over_a_rail_that_breaks):
        assert outcome.error is None, outcome


LATENCY = 5e-3


def timed(rank: int, exchange: Pipe) -> list[float]:
    times = []
    with connect(rank, exchange, loopback_mode="proxied", wire=WireFigures.alpha_beta(LATENCY * 1e6, 0.0)) as runtime:
        for size in (1, 1000, 20_000):
            exchange(b"at once")
            # The clock of the machine, which both ranks read: from when the later one has begun.
            begun = time.monotonic()
            peer_begun = float(exchange(str(begun).encode()))
            runtime.all_reduce(torch.ones(size))
            times.append(time.monotonic() - max(begun, peer_begun))
            exchange(b"done")
    return times


def test_no_message_is_faster_than_the_model() -> None:
    for outcome in run_pair(timed):
        assert outcome.error is None, outcome
        assert min(outcome.value) >= LATENCY
