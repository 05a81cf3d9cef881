"""What goes wrong ends in a sentence on both ranks, soon, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_spark.collective import (
    AgreementError,
    CollectiveAbortedError,
    CollectiveError,
    CollectiveTimeoutError,
    LaunchShape,
    MismatchError,
    PoisonedError,
    Runtime,
    RuntimeOptions,
    UsageError,
)
from vllm_spark.collective.link_model import PUBLISHED_FIGURES, WireFigures

from .pair import Pipe, connect, run_pair, values

SMALL = torch.ones(8)


def different_calls(rank: int, exchange: Pipe, calls: tuple[tuple[str, int, str], tuple[str, int, str]]) -> None:
    kind, count, dtype = calls[rank]
    runtime = connect(rank, exchange)
    tensor = torch.ones(count, dtype=getattr(torch, dtype))
    runtime.all_reduce(tensor) if kind == "all_reduce" else runtime.all_gather(tensor)


@pytest.mark.parametrize(
    "calls",
    [
        (("all_reduce", 100, "float32"), ("all_gather", 100, "float32")),
        (("all_reduce", 100, "float32"), ("all_reduce", 101, "float32")),
        (("all_reduce", 100, "float16"), ("all_reduce", 100, "bfloat16")),
        (("all_reduce", 100, "float32"), ("all_reduce", 10_000, "float32")),  # packets here, payload there
        (("all_reduce", 3_000_000, "float32"), ("all_reduce", 3_000_001, "float32")),
    ],
    ids=["kind", "size", "dtype", "protocol", "chunks"],
)
def test_ranks_that_call_different_collectives(calls: Any) -> None:
    outcomes = run_pair(different_calls, calls)
    assert any(isinstance(outcome.error, MismatchError) for outcome in outcomes), outcomes
    for outcome in outcomes:
        assert isinstance(outcome.error, (MismatchError, CollectiveAbortedError)), outcome
        assert "the ranks called different collectives at sequence" in outcome.message
        assert outcome.message.endswith("; both must call the same ones in the same order")
        for kind, count, _ in calls:
            elements = count if kind == "all_reduce" else 4 * count
            assert f"{kind} of {elements}" in outcome.message


def differing_terms(rank: int, exchange: Pipe, changed: dict[str, Any]) -> None:
    options = changed if rank == 1 else {}
    if "loopback_mode" in options or "wire" in options:
        options = {"loopback_mode": "proxied", **options}
    connect(rank, exchange, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slot_bytes", 1 << 16),
        ("packet_bytes", 1024),
        ("depth", 8),
        ("timeout_s", 29.0),
        ("first_sequence", 7),
        ("largest_message", 1 << 20),
        ("loopback_mode", "proxied"),
    ],
)
def test_every_option_must_agree(name: str, value: Any) -> None:
    for rank, outcome in enumerate(run_pair(differing_terms, {name: value})):
        assert isinstance(outcome.error, AgreementError), outcome
        assert f"the ranks differ in {name}" in outcome.message
        assert f"{value} on rank 1" in outcome.message, rank


def same_rank(rank: int, exchange: Pipe) -> None:
    connect(0, exchange)


def test_ranks_must_differ() -> None:
    for outcome in run_pair(same_rank):
        assert "this process is rank 0, and the peer is rank 0; one must" in outcome.message


@pytest.mark.parametrize(
    "options",
    [
        {"wire": PUBLISHED_FIGURES},
        {"loopback_mode": "magic"},
        {"transport": "pigeon"},
        {"largest_message": 65 << 20},
        {"first_sequence": -1},
        {"first_sequence": 1 << 32},
        {"clear_interval": 4},
        {"clear_interval": 24},
        {"clear_interval": 1 << 40},
    ],
)
def test_impossible_combinations_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match="a modelled wire" if name.startswith("wire") else f"^{name} "):
        RuntimeOptions(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"depth": 3}, "depth 3 is not a power of two from 1 to 64"),
        ({"depth": 128}, "depth 128 is not a power of two from 1 to 64"),
        ({"slot_bytes": 100}, "slot_bytes 100 is not a positive multiple of 64"),
        ({"slot_bytes": 2 << 30}, "slot_bytes 2147483648 is more than 1073741824"),
        ({"packet_bytes": 1 << 21}, "packet_bytes 2097152 is more than slot_bytes 1048576"),
        ({"timeout_s": 0.0}, "timeout_s 0 is invalid: must be 1e-09 to 1e.06 seconds"),
        ({"timeout_s": -1.0}, "timeout_s -1 is invalid"),
        ({"timeout_s": float("inf")}, "timeout_s inf is invalid"),
        ({"timeout_s": float("nan")}, "timeout_s nan is invalid"),
        ({"timeout_s": 1e10}, r"timeout_s 1e\+10 is invalid"),
    ],
)
def test_impossible_options_are_refused_by_the_native_runtime(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Runtime._make_native(0, RuntimeOptions(**{"packet_bytes": 0, **options}), stripes=1)


@pytest.mark.parametrize(
    "shape",
    [{"packet_threads": 1024}, {"payload_threads": 100}, {"payload_blocks": 65}, {"payload_bytes_per_block": 8}],
)
def test_impossible_launch_shapes_are_refused(shape: dict[str, Any]) -> None:
    (name,) = shape
    with pytest.raises(UsageError, match=name):
        LaunchShape(**shape)


def test_other_world_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="world size 4"):
        Runtime.connect(0, 4, lambda mine: mine)


def lonely(rank: int, exchange: Pipe) -> None:
    runtime = connect(rank, exchange, timeout_s=0.5)
    if rank == 0:
        try:
            runtime.all_reduce(SMALL)
        finally:
            exchange(b"done")
    exchange(b"done")


def test_waiting_is_bounded_and_explained() -> None:
    waiting, _ = run_pair(lonely)
    assert isinstance(waiting.error, CollectiveTimeoutError)
    for part in ("rank 0 waited for rank 1 on test rank 1", "all_reduce of 8 float32", "sequence 1", "within 0.5 s"):
        assert part in waiting.message
    assert "though its process is alive; see what it is doing, or allow more time (timeout_s, " in waiting.message


def stopped_past_its_time(rank: int, exchange: Pipe) -> None:
    timeout = 2.0
    runtime = connect(rank, exchange, timeout_s=timeout)
    if rank == 0:
        exchange.connection.send(os.getpid())
        sender = threading.Thread(target=say_when_sent, args=(runtime, exchange))
        sender.start()
        assert torch.equal(runtime.all_reduce(SMALL), SMALL * 2)
        sender.join()
        return
    waiting = exchange.connection.recv()
    exchange.connection.recv()
    os.kill(waiting, signal.SIGSTOP)
    try:
        runtime.all_reduce(SMALL)
        time.sleep(timeout + 0.2)
    finally:
        os.kill(waiting, signal.SIGCONT)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)


def say_when_sent(runtime: Runtime, exchange: Pipe) -> None:
    wait_until(lambda: runtime.counters().packet_messages > 0)
    exchange.connection.send("sent")


def test_a_process_that_was_stopped_finds_what_has_come_meanwhile() -> None:
    values(stopped_past_its_time)


def aborted(rank: int, exchange: Pipe) -> None:
    runtime = connect(rank, exchange)
    if rank == 1:
        exchange(b"connected")
        runtime.abort("the fuse blew")
        with pytest.raises(PoisonedError, match="the fuse blew"):
            runtime.all_reduce(SMALL)
        assert runtime.poisoned == "the fuse blew"
        return
    exchange(b"connected")
    runtime.all_reduce(SMALL)


def test_abort_ends_the_peers_wait_with_the_reason() -> None:
    waiting, aborting = run_pair(aborted)
    assert aborting.error is None, aborting
    assert isinstance(waiting.error, CollectiveAbortedError)
    assert waiting.message == "rank 1 stopped: the fuse blew"


def aborted_before(rank: int, exchange: Pipe) -> None:
    runtime = connect(rank, exchange)
    if rank == 1:
        runtime.abort("\N{BATTERY}" * 1000)
        exchange(b"aborted")
        return
    exchange(b"aborted")
    with pytest.raises(CollectiveAbortedError, match=r"rank 1 stopped: \N{BATTERY}+$"):
        runtime.all_reduce(SMALL)
    assert runtime.poisoned is not None
    with pytest.raises(PoisonedError):
        runtime.all_reduce(SMALL)


def test_an_abort_is_seen_at_the_next_call_with_whole_characters() -> None:
    values(aborted_before)


def aborted_here(rank: int, exchange: Pipe) -> None:
    runtime = connect(rank, exchange)
    if rank == 0:
        threading.Thread(target=abort_in_the_call, args=(runtime,)).start()
        with pytest.raises(CollectiveAbortedError, match="changed my mind"):
            runtime.all_reduce(SMALL)
        with pytest.raises(PoisonedError, match="changed my mind"):
            runtime.all_gather(SMALL)
    exchange(b"done")


def abort_in_the_call(runtime: Runtime) -> None:
    wait_until(lambda: runtime.counters().packet_messages > 0)
    runtime.abort("changed my mind")


def test_abort_from_another_thread() -> None:
    values(aborted_here)


def killed(rank: int, exchange: Pipe, options: dict[str, Any]) -> list[str]:
    runtime = connect(rank, exchange, **options)
    runtime.all_reduce(SMALL)
    exchange(b"done")  # a rank that is through may still have its own message to be posted by its proxy
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(CollectiveTimeoutError, match="that process has ended; its log says why"):
        runtime.all_reduce(SMALL)
    runtime.close()
    del runtime
    maps = Path("/proc/self/maps").read_text()
    return [line for line in maps.splitlines() if "vllm-spark-region" in line]


@pytest.mark.parametrize(
    "options",
    [{}, {"loopback_mode": "proxied"}, {"loopback_mode": "proxied", "wire": PUBLISHED_FIGURES}],
    ids=["direct", "proxied", "modelled"],
)
def test_killed_peer_is_noticed_and_no_memory_is_left(options: dict[str, Any]) -> None:
    survivor, victim = run_pair(killed, options)
    assert victim.exit_code == -signal.SIGKILL
    assert survivor.error is None, survivor
    assert survivor.value == [], "the survivor's mappings are gone after close"


def last_words(rank: int, exchange: Pipe, options: dict[str, Any]) -> None:
    for size in (1, 5000, 600_000):
        runtime = connect(rank, exchange, **options)
        total = runtime.all_reduce(torch.full((size,), 1.0 + rank))
        runtime.close()  # the other rank may still wait for what this one has sent
        assert torch.equal(total, torch.full((size,), 3.0))
        exchange(b"next")


@pytest.mark.parametrize(
    "options", [{}, {"loopback_mode": "proxied", "wire": WireFigures.alpha_beta(20_000.0, 0.0)}], ids=["direct", "wire"]
)
def test_closing_does_not_take_back_what_was_sent(options: dict[str, Any]) -> None:
    values(last_words, options)


def two_threads(rank: int, exchange: Pipe) -> None:
    runtime = connect(rank, exchange)
    if rank == 0:
        errors: list[BaseException] = []

        def call() -> None:
            try:
                runtime.all_reduce(SMALL)
            except CollectiveError as error:
                errors.append(error)

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while not errors and time.monotonic() < deadline:
            time.sleep(0.01)
        exchange(b"one was refused")
        for thread in threads:
            thread.join()
        assert [type(error) for error in errors] == [UsageError]
        assert "two threads" in str(errors[0])
        return
    exchange(b"one was refused")
    runtime.all_reduce(SMALL)


def test_two_threads_at_once_are_an_error_not_a_race() -> None:
    values(two_threads)


def forked(rank: int, exchange: Pipe) -> None:
    runtime = connect(rank, exchange)
    child = os.fork()
    if child == 0:
        try:
            runtime.all_reduce(SMALL)
        except UsageError as error:
            runtime.abort("a fork's")
            runtime.close()
            os._exit(0 if "not to its fork" in str(error) else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(runtime.all_reduce(SMALL), SMALL * 2), "the parent goes on"
    assert runtime.poisoned is None


def test_a_fork_may_not_use_the_runtime() -> None:
    values(forked)


def coalesced(rank: int, exchange: Pipe) -> int:
    with connect(rank, exchange, loopback_mode="proxied", slot_bytes=4096, packet_bytes=1024, depth=4) as runtime:
        runtime.all_reduce(SMALL)
        if rank == 0:
            runtime._native.hold_proxy(True)
            threading.Thread(target=let_go_of_four, args=(runtime,)).start()
        total = runtime.all_reduce(torch.full((4096,), 1.0 + rank))  # four chunks, all rung while the proxy is held
        assert torch.equal(total, torch.full((4096,), 3.0))
        exchange(b"read")
        return runtime.counters().proxy_coalesced


def let_go_of_four(runtime: Runtime) -> None:
    first = runtime.counters().last_sequence
    wait_until(lambda: runtime.counters().last_sequence >= first + 4)
    runtime._native.hold_proxy(False)


def test_the_doorbell_is_a_level() -> None:
    held, _ = values(coalesced)
    assert held >= 3, "the proxy found several sequence numbers at one look, and posted each"


def wrong_memory(rank: int, exchange: Pipe) -> None:
    def tamper(mine: bytes) -> bytes:
        theirs = exchange(mine)
        if rank == 1 or b"nonce" not in theirs:
            return theirs
        message = json.loads(theirs)
        message["nonce"][0] = hex(int(message["nonce"][0], 16) ^ 1)
        return json.dumps(message).encode()

    connect(rank, tamper)


def other_machine(rank: int, exchange: Pipe) -> None:
    def tamper(mine: bytes) -> bytes:
        return exchange(mine).replace(b'"boot":"', b'"boot":"another-')

    connect(rank, tamper)


def test_memory_that_is_not_the_peers_is_refused() -> None:
    first, second = run_pair(wrong_memory)
    assert "is not the peer" in first.message
    assert "the peer could not connect" in second.message
    for outcome in run_pair(other_machine):
        assert "the peer runs on another machine" in outcome.message


def closed(rank: int, exchange: Pipe) -> None:
    runtime = connect(rank, exchange)
    runtime.all_reduce(SMALL)
    exchange(b"done")
    runtime.close()
    runtime.close()
    assert runtime.closed
    with pytest.raises(UsageError, match=rf"^rank {rank} has closed its runtime; connect"):
        runtime.all_reduce(SMALL)


def test_close_may_be_called_again() -> None:
    values(closed)
