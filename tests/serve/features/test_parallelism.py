"""Ways of vLLM to divide work that are not half of each layer: each runs on a pair as on stock, or is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from openai import InternalServerError

from tests.serve import prompts
from tests.serve.hosts import Hosts
from tests.serve.process import ProcessError
from tests.serve.servers import START_SECONDS, Server, spark_tp2, stock_tp1, stock_tp2

from .report import STOCK_LIMIT, record
from .side_by_side import side_by_side

pytestmark = pytest.mark.thorough

EXPERT_PARALLEL = "--enable-expert-parallel"


def test_whole_experts_on_each_rank(hosts: Hosts, tiny_moe: Path) -> None:
    """A rank of vLLM's CPU build ends with SIGSEGV at the first request; the pair says so before it loads anything."""
    with stock_tp2(hosts, tiny_moe, [EXPERT_PARALLEL]) as stock, pytest.raises(InternalServerError):
        prompts.greedy_tokens(stock.client, prompts.PROMPTS[:1], 4)
    assert "died unexpectedly" in stock.leader.output()
    with spark_tp2(hosts, tiny_moe, [EXPERT_PARALLEL], wait=False) as pair:
        assert pair.leader.wait(START_SECONDS) == 2
        assert f"{EXPERT_PARALLEL} cannot be used with --spark on CPUs: there vLLM's" in pair.leader.tail()
    record("expert parallelism", EXPERT_PARALLEL, f"{STOCK_LIMIT}: the first request ends a rank with SIGSEGV")


def test_whole_experts_of_a_model_without(hosts: Hosts, tiny_dense: Path) -> None:
    """vLLM refuses it, and the pair with its sentence."""
    sentence = "Number of experts in the model must be greater than 0 when expert parallelism is enabled"
    with pytest.raises(ProcessError), stock_tp1(hosts[0], tiny_dense, [EXPERT_PARALLEL]):
        pass
    with spark_tp2(hosts, tiny_dense, [EXPERT_PARALLEL], wait=False) as pair:
        assert pair.leader.wait(START_SECONDS) == 2
        assert sentence in pair.leader.tail()
    record("expert parallelism", f"{EXPERT_PARALLEL}, a model without experts", f"{STOCK_LIMIT}: {sentence}")


@pytest.mark.parametrize("scheduling", ["--async-scheduling", "--no-async-scheduling"])
def test_scheduling(hosts: Hosts, tiny_moe: Path, scheduling: str) -> None:
    """On CPUs vLLM turns the first one off."""

    def ask(server: Server) -> list[list[int]]:
        return prompts.greedy_tokens(server.client, prompts.PROMPTS[:4], 24)

    with (
        side_by_side(hosts, tiny_moe, [scheduling]) as both,
        both.same("scheduling", scheduling, ask, lambda answers: f"{sum(map(len, answers))} tokens") as answers,
    ):
        assert len({str(answer) for answer in answers}) == 4
