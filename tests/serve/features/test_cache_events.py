"""`--kv-events-config`: what the cache of prefixes stores is published by the leader as by stock vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from tests.serve.hosts import Hosts
from tests.serve.servers import Server, spark_tp2, stock_tp2

from .report import EQUAL, record
from .side_by_side import model_of, request

pytestmark = pytest.mark.thorough

PROMPT = list(range(5, 405))
BLOCK = 128
"""Tokens in a block of vLLM's CPU build."""


@contextmanager
def subscribed(endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    context = zmq.Context()
    socket = context.socket(zmq.SUB)
    try:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.setsockopt(zmq.RCVTIMEO, 30_000)
        socket.connect(endpoint)
        yield socket
    finally:
        socket.close(0)
        context.term()


def received(socket: zmq.Socket[bytes]) -> list[dict[str, Any]]:
    """The events of the next message; raises zmq.Again if none comes within 30 s."""
    _, _, payload = socket.recv_multipart()
    events: list[dict[str, Any]] = msgspec.msgpack.decode(payload)[1]
    return events


def complete(server: Server, prompt: Sequence[int], length: int) -> None:
    options = {"model": model_of(server), "temperature": 0, "max_tokens": length, "ignore_eos": True}
    assert request(server, "POST", "/v1/completions", json=options | {"prompt": prompt}).status_code == 200


def events_of(server: Server, endpoint: str) -> list[Any]:
    """The blocks that are stored for `PROMPT` and 128 tokens of its answer, each with its tokens."""
    with subscribed(endpoint) as socket:
        for number in range(60):  # the first ones are published before the subscription has reached the server
            complete(server, [1000 + number] * (BLOCK + 1), 1)
            if socket.poll(500):
                break
        while socket.poll(1000):
            received(socket)
        complete(server, PROMPT, BLOCK)
        stored: list[Any] = []
        while sum(len(event["token_ids"]) for event in stored) < (len(PROMPT) + BLOCK) // BLOCK * BLOCK:
            stored += [event for event in received(socket) if event["type"] == "BlockStored"]
        return [[event["token_ids"], event["block_size"], event["parent_block_hash"] is None] for event in stored]


def test_events_of_the_cache(hosts: Hosts, tiny_dense: Path, short_folder: Path) -> None:
    """One after the other: both publish at the same path."""
    endpoint = f"ipc://{short_folder}/events"
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    arguments = ["--enable-prefix-caching", "--kv-events-config", json.dumps(config)]
    with stock_tp2(hosts, tiny_dense, arguments) as server:
        expected = events_of(server, endpoint)
    with spark_tp2(hosts, tiny_dense, arguments) as server:
        events = events_of(server, endpoint)
    assert events == expected
    tokens = [token for stored, _, _ in events for token in stored]
    assert tokens[: len(PROMPT)] == PROMPT
    record("events of the KV cache", "--kv-events-config, zmq", f"{EQUAL}: {len(tokens)} tokens in blocks")
