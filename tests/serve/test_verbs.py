"""A pair whose messages go over RDMA rails, with NICs that are emulated: tokens, and answers over an outage."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.emulated_nics import RAILS, EmulatedNics

from . import prompts
from .hosts import Hosts
from .servers import Server, spark_tp2

OUTAGE_SECONDS = 3.0


@pytest.fixture
def pair_with_rails(hosts: Hosts, tiny_moe: Path, nics: EmulatedNics) -> Iterator[Server]:
    arguments = ["--spark-transport", "verbs"]
    with spark_tp2(hosts, tiny_moe, arguments, nics.environment) as server:
        yield server


@pytest.mark.thorough
def test_tokens_also_while_rails_are_out(
    pair_with_rails: Server, nics: EmulatedNics, reference_tokens: list[list[int]]
) -> None:
    """One rail, then the other one, then both: no request fails, and every token is that of one rank."""
    server = pair_with_rails
    assert f"verbs on rail 0 ({RAILS[0]}) and rail 1 ({RAILS[1]})" in server.leader.output()
    assert prompts.greedy_tokens(server.client) == reference_tokens
    for rails in ((0,), (1,), (0, 1)):
        failures = server.metrics()["vllm_spark_rail_failures_total"]["0"]

        def break_rails(rails: tuple[int, ...] = rails) -> None:
            time.sleep(0.2)  # amid the answers
            with nics.fault("cut", 1, *rails):
                time.sleep(OUTAGE_SECONDS)

        thread = threading.Thread(target=break_rails)
        thread.start()
        while thread.is_alive():
            assert prompts.greedy_tokens(server.client) == reference_tokens
        thread.join()
        assert prompts.greedy_tokens(server.client) == reference_tokens
        assert server.metrics()["vllm_spark_rail_failures_total"]["0"] > failures
    metrics = server.metrics()
    assert metrics["vllm_spark_rail_failures_total"] == metrics["vllm_spark_rail_recoveries_total"]
