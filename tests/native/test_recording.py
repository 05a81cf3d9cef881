"""What a runtime records of its collectives and posted messages, between start and stop."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from vllm_spark.collective import RuntimeRecords
from vllm_spark.collective.link_model import WireFigures

from .pair import Pipe, connect, values

SLOT, PACKETS = 4096, 512
LATE = 0.02
"""Seconds that rank 1 comes late to the second collective."""
MODES: dict[str, dict[str, Any]] = {
    "direct": {},
    "proxied": {"loopback_mode": "proxied"},
    "proxied over a modelled rail": {"loopback_mode": "proxied", "wire": WireFigures.alpha_beta(50.0, 24.0)},
}


def recorded(rank: int, exchange: Pipe, options: dict[str, Any]) -> tuple[int, RuntimeRecords, int, RuntimeRecords]:
    with connect(rank, exchange, slot_bytes=SLOT, packet_bytes=PACKETS, **options) as runtime:
        runtime.all_reduce(torch.ones(8))
        exchange(b"")
        before = time.monotonic_ns()
        runtime.start_recording(100)
        runtime.all_reduce(torch.ones(64))
        if rank == 1:
            time.sleep(LATE)
        runtime.all_reduce(torch.ones(64, dtype=torch.bfloat16))
        runtime.all_gather(torch.ones(3 * SLOT // 4))
        exchange(b"")  # the peer has every message, so the proxy has posted them
        found = runtime.stop_recording()
        after = time.monotonic_ns()
        runtime.all_reduce(torch.ones(8))
        assert runtime.stop_recording() == RuntimeRecords([], [], 0)
        return before, found, after, runtime.stop_recording()


@pytest.mark.parametrize("mode", MODES)
def test_what_is_recorded(mode: str) -> None:
    for rank, (before, records, after, _) in enumerate(values(recorded, MODES[mode])):
        first, late, large = records.operations
        assert [(each.kind, each.bytes, each.sequence, each.messages, each.packets) for each in records.operations] == [
            ("all_reduce", 256, 2, 1, True),
            ("all_reduce", 128, 3, 1, True),
            ("all_gather", 3 * SLOT, 4, 3, False),
        ]
        at = before
        for each in (first, late, large):
            assert at <= each.start <= each.sent <= each.arrived <= each.end <= after
            assert 0 <= each.waited <= each.end - each.start
            assert (each.wait > 0) == (each.waited > 0)
            at = each.end
        if rank == 0:
            assert late.waited > LATE / 2 * 1e9
            assert late.start <= late.wait < late.arrived
        assert records.lost == 0
        posted = [(post.sequence, post.bytes, post.packets) for post in records.posts]
        assert posted == (
            [] if mode == "direct" else [(2, 528, True), (3, 272, True), *[(each, SLOT, False) for each in (4, 5, 6)]]
        )
        assert all(before <= post.time <= after for post in records.posts)


def overflowing(rank: int, exchange: Pipe) -> tuple[int, int]:
    with connect(rank, exchange) as runtime:
        runtime.start_recording(2)
        for _ in range(5):
            runtime.all_reduce(torch.ones(8))
        found = runtime.stop_recording()
        runtime.start_recording(2)
        again = runtime.stop_recording()
        assert again == RuntimeRecords([], [], 0)
        return len(found.operations), found.lost


def test_more_than_there_is_room_for() -> None:
    assert values(overflowing) == ((2, 3), (2, 3))
