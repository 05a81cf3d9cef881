"""Several API server processes for one pair: one of them, the first, starts the engine."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_spark.errors import EXIT_LOST

from . import prompts
from .features.report import EQUAL, ONE_RANK, record
from .hosts import Hosts
from .process import assert_all_gone, descendant
from .servers import Server, spark_tp2

pytestmark = pytest.mark.thorough

SCRAPES = 16
LOST = "the follower on .* (closed the connection|broke)"


@pytest.fixture(scope="module", params=["flags", "environment"])
def several(hosts: Hosts, tiny_moe: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """With `--spark`, and with VLLMSPARK_ENABLE besides: all processes read that one for themselves."""
    enabled = {"VLLMSPARK_ENABLE": "1"} if request.param == "environment" else {}
    with spark_tp2(hosts, tiny_moe, ["--api-server-count", "2"], enabled) as server:
        yield server


def test_every_api_server_shows_the_counters(several: Server, reference_tokens: list[list[int]]) -> None:
    """Each has the tokens of one rank, and each shows what the one engine did."""
    assert prompts.greedy_tokens(several.client) == reference_tokens
    output = several.leader.output()
    assert {"ApiServer_0", "ApiServer_1"} <= set(re.findall(r"ApiServer_\d", output))
    assert "cannot listen" not in output

    def shown() -> dict[str, dict[str, float]]:
        return {name: values for name, values in several.metrics().items() if name != "vllm_spark_wait_seconds_total"}

    def is_settled() -> bool:
        steps = shown().get("vllm_spark_steps_total", {})
        return steps.keys() == {"0", "1"} and steps["0"] == steps["1"] >= max(map(len, reference_tokens))

    several.leader.wait_until(is_settled, 20.0, "both ranks' counters of the same steps")
    expected = shown()
    assert len(set(expected["vllm_spark_token_digest"].values())) == 1
    assert expected["vllm_spark_all_reduces_total"]["0"] > 0
    for _ in range(SCRAPES):  # each over a connection of its own, which either of them takes
        assert shown() == expected
    assert several.labelled("vllm:prompt_tokens_total") > 0, "what they count together is shown too"
    tokens = sum(map(len, reference_tokens))
    record("--api-server-count", "2, with metrics", f"{EQUAL}: {tokens} tokens", stock=ONE_RANK)


def test_a_lost_follower_is_explained(several: Server) -> None:
    assert several.follower is not None
    session = descendant(several.follower, "vllm_spark.entrypoints.follower_process")
    os.kill(session.pid, signal.SIGKILL)
    several.leader.wait_for_line(f"Serving ends: .*{LOST}", 20.0)
    assert several.leader.wait(60) == EXIT_LOST
    # Not at the beginning of a line: a library of another process may have ended without one.
    (sentence,) = re.findall("vllm serve --spark: .*", several.leader.output())
    assert re.search(LOST, sentence)
    assert_all_gone(several.leader)
