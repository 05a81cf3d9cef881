"""The pair answers with one rank's tokens, and every collective goes through the runtime."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from vllm_spark.collective.link_model import PUBLISHED_FIGURES, store_wire_model

from . import prompts
from .counters import settled
from .hosts import Host, Hosts
from .process import assert_all_gone
from .servers import Server, spark_tp2, stock_tp1, stock_tp2

LAYERS = 4
ALL_REDUCES_PER_FORWARD = 1 + 2 * LAYERS  # the embedding; after attention and after the experts of each layer


@pytest.mark.parametrize("concurrency", [1, 16])
def test_greedy_tokens_equal_those_of_one_rank(
    pair: Server, reference_tokens: list[list[int]], concurrency: int
) -> None:
    assert len(prompts.PROMPTS) >= 16
    assert prompts.greedy_tokens(pair.client, concurrency=concurrency) == reference_tokens


def assert_every_collective_goes_through_the_runtime(server: Server) -> None:
    """Has 32 tokens of the tiny MoE made, and counts each rank's collectives meanwhile."""
    before = settled(server)
    prompts.greedy_tokens(server.client, prompts.PROMPTS[:1], max_tokens=32, concurrency=1)
    after = settled(server)
    for rank in ("0", "1"):
        delta = {name: after[name][rank] - before[name][rank] for name in after if name in before}
        assert delta["vllm_spark_steps_total"] == 32
        assert delta["vllm_spark_all_reduces_total"] == 32 * ALL_REDUCES_PER_FORWARD
        assert delta["vllm_spark_all_gathers_total"] == 32
        assert after["vllm_spark_fallbacks_total"][rank] == 0


def test_every_collective_of_a_forward_goes_through_the_runtime(pair: Server) -> None:
    assert_every_collective_goes_through_the_runtime(pair)


def test_dense_model(hosts: Hosts, host: Host, tiny_dense: Path) -> None:
    # Plugins shut out: the tokens of a vLLM that has never heard of this project. `reference_tokens` come from a
    # server that has loaded it.
    with stock_tp1(host, tiny_dense, env={"VLLM_PLUGINS": ""}) as server:
        expected = prompts.greedy_tokens(server.client)
    with spark_tp2(hosts, tiny_dense) as server:
        alone = prompts.greedy_tokens(server.client, prompts.PROMPTS[:6], concurrency=1)
        together = prompts.greedy_tokens(server.client, concurrency=16)
        assert set(server.metrics()["vllm_spark_fallbacks_total"].values()) == {0}
        os.killpg(server.leader.pid, signal.SIGINT)  # a terminal's Ctrl-C: its engine may end before it is asked to
        assert server.leader.wait(60) == 0
        assert "Traceback" not in server.leader.output()
    assert_all_gone(*server.processes)
    if (alone, together) != (expected[:6], expected):
        with stock_tp2(hosts, tiny_dense) as server:
            assert prompts.greedy_tokens(server.client) == expected, "stock vLLM's two ranks already differ from one"
    assert alone == expected[:6]
    assert together == expected


@pytest.mark.thorough
def test_compiled_model(hosts: Hosts, tiny_moe: Path, reference_tokens: list[list[int]]) -> None:
    """Compiled graphs see collectives as opaque operators that leave their input alone."""
    with spark_tp2(hosts, tiny_moe, ["--no-enforce-eager"]) as server:
        assert prompts.greedy_tokens(server.client, concurrency=16) == reference_tokens
        assert "CompilationMode.DYNAMO_TRACE_ONCE" in server.leader.output(), "compiled, as far as the CPU build goes"
        assert_every_collective_goes_through_the_runtime(server)


@pytest.mark.thorough
def test_proxied_over_a_modelled_link(
    hosts: Hosts, tiny_moe: Path, reference_tokens: list[list[int]], tmp_path: Path
) -> None:
    """The leader's file, which the follower does not have."""
    wire = tmp_path / "wire.json"
    store_wire_model(PUBLISHED_FIGURES, wire)
    with spark_tp2(hosts, tiny_moe, ["--spark-loopback-mode", "proxied", "--spark-wire", str(wire)]) as server:
        before = settled(server)
        posts = before["vllm_spark_proxy_posts_total"]
        assert before["vllm_spark_rails_up"] == {"0": 2, "1": 2}
        assert prompts.greedy_tokens(server.client, concurrency=16) == reference_tokens
        assert_every_collective_goes_through_the_runtime(server)
        now = server.metrics()["vllm_spark_proxy_posts_total"]
        # A message at least for each collective.
        least = 32 * (ALL_REDUCES_PER_FORWARD + 1)
        assert all(now[rank] >= posts[rank] + least for rank in ("0", "1")), (posts, now)
