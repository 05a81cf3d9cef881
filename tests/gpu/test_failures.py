"""Kernels that give up: bounded waits, a sentence on both ranks, and a runtime that is unusable afterwards."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_spark.bench.gpu_ranks import Exchange, GpuPair
from vllm_spark.collective import (
    AgreementError,
    CollectiveAbortedError,
    CollectiveError,
    CollectiveTimeoutError,
    DeviceRuntime,
    LaunchShape,
    MismatchError,
    PoisonedError,
    RuntimeOptions,
    UsageError,
)

MakePair = Callable[..., GpuPair]


def ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16, device="cuda")


def wait_for(pair: GpuPair, rank: int) -> None:
    """Waits for the rank's stream, then raises what its kernels met."""
    pair.streams[rank].synchronize()
    pair.runtimes[rank].check()


@pytest.mark.parametrize("size", [64, 1 << 18], ids=["packets", "payload"])
def test_peer_that_does_not_come(make_pair: MakePair, size: int) -> None:
    pair = make_pair(timeout_s=0.5)

    def body(rank: int) -> None:
        if rank == 0:
            pair.runtimes[0].all_reduce(ones(size))
            wait_for(pair, 0)

    start = time.monotonic()
    first, second = pair.outcomes(body)
    assert isinstance(first, CollectiveTimeoutError)
    assert second is None
    assert "rank 0 waited for rank 1 on test rank 1" in str(first)
    assert f"an all_reduce of {size} bfloat16, sequence 1" in str(first)
    assert "within 0.5 s, though its process is alive" in str(first)
    assert time.monotonic() - start < 5
    with pytest.raises(PoisonedError, match="waited for rank 1"):
        pair.run(lambda rank: pair.runtimes[0].all_reduce(ones(8)) if rank == 0 else None)
    with pytest.raises(CollectiveError, match="rank 0 stopped: rank 0 waited"):
        pair.run(lambda rank: pair.runtimes[1].all_reduce(ones(8)) if rank == 1 else None)


def test_different_sizes(make_pair: MakePair) -> None:
    pair = make_pair(timeout_s=5.0)

    def body(rank: int) -> None:
        pair.runtimes[rank].all_reduce(ones(64 + 64 * rank))
        wait_for(pair, rank)

    outcomes = pair.outcomes(body)
    assert all(isinstance(outcome, CollectiveError) for outcome in outcomes)
    mismatch = next(outcome for outcome in outcomes if isinstance(outcome, MismatchError))
    assert "an all_reduce of 64 bfloat16" in str(mismatch)
    assert "an all_reduce of 128 bfloat16" in str(mismatch)


def test_sizes_that_travel_in_different_ways(make_pair: MakePair) -> None:
    """Seen long before the time-out, although neither rank gets the message that it waits for."""
    pair = make_pair(timeout_s=50.0)

    def body(rank: int) -> None:
        pair.runtimes[rank].all_reduce(ones(64 if rank == 0 else 1 << 18))
        wait_for(pair, rank)

    start = time.monotonic()
    outcomes = pair.outcomes(body)
    assert all(isinstance(outcome, CollectiveError) for outcome in outcomes)
    mismatch = next(outcome for outcome in outcomes if isinstance(outcome, MismatchError))
    assert "an all_reduce of 64 bfloat16" in str(mismatch)
    assert f"an all_reduce of {1 << 18} bfloat16" in str(mismatch)
    assert time.monotonic() - start < 5


def test_different_launch_shapes(make_pair: MakePair) -> None:
    shapes = (LaunchShape(), LaunchShape(payload_blocks=16))
    with pytest.raises(AgreementError, match="the ranks differ in payload_blocks"):
        make_pair(launch=shapes)


def killed_peer(queues: tuple[Any, Any], death: Any) -> None:
    torch.zeros(1, device="cuda")
    kept = DeviceRuntime.connect(1, 2, Exchange(queues[1], queues[0]), RuntimeOptions(timeout_s=50.0))
    death.wait(60)
    assert not kept.closed
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("size", [64, 1 << 18], ids=["packets", "payload"])
def test_killed_peer(size: int) -> None:
    """A kernel cannot see that a process has ended; somebody tells it, long before the time-out."""
    spawn = multiprocessing.get_context("spawn")
    queues, death = (spawn.Queue(), spawn.Queue()), spawn.Event()
    peer = spawn.Process(target=killed_peer, args=(queues, death), daemon=True)
    peer.start()
    options = RuntimeOptions(timeout_s=50.0)
    runtime = DeviceRuntime.connect(0, 2, Exchange(*queues), options, description="the survivor")
    result = runtime.all_reduce(ones(size))
    start = time.monotonic()
    death.set()
    torch.cuda.synchronize()
    assert time.monotonic() - start < 5
    with pytest.raises(CollectiveAbortedError, match="rank 1: that process has ended"):
        runtime.check()
    with pytest.raises(PoisonedError, match="that process has ended"):
        runtime.check()
    peer.join(10)
    runtime.close()
    assert result.add(1).shape == (size,), "the GPU works on"
    torch.cuda.synchronize()


@pytest.mark.parametrize("size", [64, 1 << 18], ids=["packets", "payload"])
def test_abort_ends_a_wait(make_pair: MakePair, size: int) -> None:
    pair = make_pair(timeout_s=60.0)

    def body(rank: int) -> None:
        if rank == 0:
            pair.runtimes[0].all_reduce(ones(size))
            wait_for(pair, 0)
        else:
            time.sleep(0.3)
            pair.runtimes[1].abort("a reason")

    start = time.monotonic()
    first, _ = pair.outcomes(body)
    assert isinstance(first, CollectiveAbortedError)
    assert str(first) == "rank 1 stopped: a reason"
    assert time.monotonic() - start < 5
    for runtime in pair.runtimes:
        with pytest.raises(PoisonedError, match="a reason"):
            runtime.check()


@pytest.mark.parametrize("sizes", [(64, 64), (64, 1 << 18), (1 << 18, 64), (1 << 18, 1 << 18)], ids=str)
def test_two_streams_at_once(make_pair: MakePair, sizes: tuple[int, int]) -> None:
    pair = make_pair(timeout_s=2.0)

    def body(rank: int) -> None:
        if rank == 0:
            second = torch.cuda.Stream()
            tensors = [ones(size) for size in sizes]
            torch.cuda.synchronize()
            pair.runtimes[0].all_reduce(tensors[0])
            with torch.cuda.stream(second):
                pair.runtimes[0].all_reduce(tensors[1])
            second.synchronize()
            wait_for(pair, 0)

    first, _ = pair.outcomes(body)
    assert isinstance(first, UsageError)
    assert "on two streams at the same time" in str(first)


def test_a_full_launch_queue_stops_no_other_thread(make_pair: MakePair) -> None:
    """The driver makes a launch wait while some thousand are queued, as they are when a peer does not answer.

    Heartbeats, and the thread that heals a link, must go on meanwhile.
    """
    pair = make_pair(timeout_s=40.0)
    launches, launched, ends = 20_000, 0, []

    def launch() -> None:
        nonlocal launched
        with torch.cuda.device(pair.devices[0]), torch.cuda.stream(pair.streams[0]):
            tensor = ones(64)
            out = torch.empty_like(tensor)
            try:
                for _ in range(launches):
                    pair.runtimes[0].all_reduce(tensor, out)
                    launched += 1
            except CollectiveError as error:
                ends.append(error)

    thread = threading.Thread(target=launch, daemon=True)
    thread.start()
    before = -1
    while launched != before:  # one launch takes microseconds
        before = launched
        thread.join(1.0)
        assert thread.is_alive(), f"the launches ended: {ends}"
    assert 0 < launched < launches
    pair.runtimes[1].abort("the test has seen enough")
    thread.join(60.0)
    assert not thread.is_alive()
    # With the interpreter's lock held, this thread would have come to that only after the kernel's time-out.
    assert "the test has seen enough" in str(ends[0])
    assert not isinstance(ends[0], CollectiveTimeoutError)


def test_proxy_that_is_not_scheduled(make_pair: MakePair) -> None:
    """The peer waits, and goes on when the proxy comes back."""
    pair = make_pair(loopback_mode="proxied", timeout_s=20.0)
    pair.runtimes[0]._native.hold_proxy(True)

    def body(rank: int) -> torch.Tensor:
        result = pair.runtimes[rank].all_reduce(ones(2048))
        if rank == 0:
            time.sleep(0.5)
            pair.runtimes[0]._native.hold_proxy(False)
        return result

    for result in pair.run(body):
        assert result.eq(2).all()
    for runtime in pair.runtimes:
        runtime.check()
