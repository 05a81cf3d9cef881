"""Collectives on CUDA tensors over rails, with NICs that are emulated: what happens when rails fail under kernels."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.native.emulated_nics import EmulatedNics
from vllm_spark.bench.gpu_ranks import GpuPair
from vllm_spark.collective import CollectiveError, CollectiveTimeoutError

from .test_many import run_many

MakePair = Callable[..., GpuPair]
VERBS: dict[str, Any] = {"transport": "verbs"}
FAULTS = (
    ("cut", 1, (0,)),
    ("cut", 1, (1,)),
    ("cut", 1, (0, 1)),
    ("lose_over", 2048, (0,)),
    ("delay_us", 5_000, (1,)),
    ("refuse_posts", 2, (0,)),
    ("fail_next", 9, (1,)),
)
FAULT_SECONDS = 1.0


def ones(size: int = 64) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16, device="cuda")


def test_many_while_rails_fail(make_pair: MakePair, nics_of_this_process: EmulatedNics) -> None:
    """Eager and in graphs that are replayed meanwhile; every result is right, and every rail comes back."""
    pair = make_pair(timeout_s=50.0, **VERBS)
    with nics_of_this_process.failing_rails(FAULTS, FAULT_SECONDS, FAULT_SECONDS, seed=4) as faults:
        while faults.total() < len(FAULTS):
            run_many(pair)
    for _ in range(100):  # until both rails work again
        if all(runtime.counters().rails_up == 2 for runtime in pair.runtimes):
            break
        time.sleep(0.1)
    for runtime in pair.runtimes:
        counters = runtime.counters()
        assert counters.rails_up == 2
        assert counters.rail_failures == counters.rail_recoveries > 0


def test_a_rail_that_loses_large_packets_carries_nothing(
    make_pair: MakePair, nics_of_this_process: EmulatedNics
) -> None:
    with nics_of_this_process.fault("lose_over", 256, 0):
        pair = make_pair(timeout_s=50.0, **VERBS)
        results = pair.run(lambda rank: [pair.runtimes[rank].all_reduce(ones(size)) for size in (8, 4096, 1 << 18)])
        assert all(result.eq(2).all() for each in results for result in each)
        assert all(runtime.counters().rail_posts[0] == 0 for runtime in pair.runtimes)


@pytest.mark.parametrize("size", [64, 1 << 18], ids=["packets", "payload"])
def test_a_wait_over_an_outage_ends_with_it(make_pair: MakePair, nics_of_this_process: EmulatedNics, size: int) -> None:
    pair = make_pair(timeout_s=50.0, **VERBS)
    pair.run(lambda rank: pair.runtimes[rank].all_reduce(ones(size)))
    with nics_of_this_process.fault("cut", 1):
        launched = [threading.Event(), threading.Event()]

        def body(rank: int) -> torch.Tensor:
            result = pair.runtimes[rank].all_reduce(ones(size))
            launched[rank].set()
            return result

        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.extend(pair.run(body)))
        thread.start()
        assert all(event.wait(20) for event in launched)
        thread.join(2)
        assert thread.is_alive(), "no message can have come"
    thread.join(40)
    assert [bool(result.eq(2).all()) for result in results] == [True, True]


@pytest.mark.parametrize("way", ["abort", "close"])
def test_an_end_while_both_rails_are_out(make_pair: MakePair, nics_of_this_process: EmulatedNics, way: str) -> None:
    """The reason reaches the other rank out of band, and its kernel's wait ends long before its time-out."""
    pair = make_pair(timeout_s=50.0, **VERBS)
    pair.run(lambda rank: pair.runtimes[rank].all_reduce(ones()))

    def body(rank: int) -> None:
        if rank == 0:
            pair.runtimes[0].all_reduce(ones())
            pair.streams[0].synchronize()
            pair.runtimes[0].check()
        else:
            time.sleep(1.0)
            if way == "abort":
                pair.runtimes[1].abort("a reason")
            else:
                pair.runtimes[1].close()

    with nics_of_this_process.fault("cut", 1):
        begun = time.monotonic()
        waiting, _ = pair.outcomes(body)
        assert time.monotonic() - begun < 30
    assert isinstance(waiting, CollectiveError)
    assert not isinstance(waiting, CollectiveTimeoutError)
    assert ("a reason" if way == "abort" else "it closed its runtime") in str(waiting)


def test_a_link_that_stays_out_is_named(make_pair: MakePair, nics_of_this_process: EmulatedNics) -> None:
    pair = make_pair(timeout_s=50.0, link_timeout_s=2.0, **VERBS)
    pair.run(lambda rank: pair.runtimes[rank].all_reduce(ones()))

    def body(rank: int) -> None:
        pair.runtimes[rank].all_reduce(ones())
        pair.streams[rank].synchronize()
        pair.runtimes[rank].check()

    with nics_of_this_process.fault("cut", 1):
        outcomes = pair.outcomes(body)
    assert all("no rail came back within 2.0 s" in str(outcome) for outcome in outcomes)
    assert any("transport retry counter exceeded (status 12, vendor error 0x81" in str(each) for each in outcomes)


def test_a_full_launch_queue_does_not_keep_a_link_from_healing(
    make_pair: MakePair, nics_of_this_process: EmulatedNics
) -> None:
    """The driver makes launches wait while some thousand are queued, as they are while no rail works."""
    pair = make_pair(timeout_s=50.0, **VERBS)
    launches = 3000

    def body(rank: int) -> torch.Tensor:
        tensor = ones()
        out = torch.empty_like(tensor)
        for _ in range(launches):
            pair.runtimes[rank].all_reduce(tensor, out)
        return out

    pair.run(lambda rank: pair.runtimes[rank].all_reduce(ones()))
    with nics_of_this_process.fault("cut", 1):
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.extend(pair.run(body)))
        thread.start()
        thread.join(3.0)
        assert thread.is_alive()
    thread.join(50.0)
    assert [bool(result.eq(2).all()) for result in results] == [True, True]


@pytest.mark.parametrize("refused", [0, 1, 2], ids=["none", "sending part", "receiving part"])
def test_memory_that_a_nic_cannot_pin(
    make_pair: MakePair, nics_of_this_process: EmulatedNics, caplog: pytest.LogCaptureFixture, refused: int
) -> None:
    """Each rank has memory of the GPU's driver, or else memory that the NIC pins first."""
    nics_of_this_process.set("refuse_pinning", refused, 0)
    with caplog.at_level("WARNING", logger="vllm_spark"):
        pair = make_pair(timeout_s=50.0, **VERBS)
    results = pair.run(lambda rank: pair.runtimes[rank].all_reduce(ones(1 << 18)))
    assert all(result.eq(2).all() for result in results)
    said = [record.getMessage() for record in caplog.records if "memory that the NIC pins first" in record.getMessage()]
    assert bool(said) == bool(refused)
    assert all("cannot pin" in sentence for sentence in said)
