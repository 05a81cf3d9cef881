"""Ways of vLLM to divide work that are not half of each layer: each runs on a pair as on stock, or is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve import prompts
from tests.serve.hosts import Hosts
from tests.serve.process import ProcessError
from tests.serve.servers import Server, spark_tp2, stock_tp2

from .report import STOCK_LIMIT, record
from .side_by_side import side_by_side

pytestmark = pytest.mark.thorough

EXPERT_PARALLEL = "--enable-expert-parallel"


def test_whole_experts_on_each_rank(hosts: Hosts, tiny_moe: Path) -> None:
    """vLLM's CPU build ends with SIGSEGV; the pair says so before it loads anything."""
    with pytest.raises(ProcessError), stock_tp2(hosts, tiny_moe, [EXPERT_PARALLEL]) as stock:
        prompts.greedy_tokens(stock.client, prompts.PROMPTS[:1], 4)
    logs = [log.read_text() for host in hosts for log in host.logs.glob("*-vllm-serve*.log")]
    assert any("died unexpectedly" in log or "SIGSEGV" in log for log in logs)
    with spark_tp2(hosts, tiny_moe, [EXPERT_PARALLEL], wait=False) as pair:
        assert pair.leader.wait(120) == 2
        assert f"{EXPERT_PARALLEL} cannot be used with --spark on CPUs: there vLLM's" in pair.leader.tail()
    record("expert parallelism", EXPERT_PARALLEL, f"{STOCK_LIMIT}: the kernel for experts ends with SIGSEGV")


def test_whole_experts_of_a_model_without(hosts: Hosts, tiny_dense: Path) -> None:
    """The option has no effect there."""

    def ask(server: Server) -> list[list[int]]:
        return prompts.greedy_tokens(server.client, prompts.PROMPTS[:4], 24)

    with (
        side_by_side(hosts, tiny_dense, [EXPERT_PARALLEL, "--async-scheduling"]) as both,
        both.same(
            "expert parallelism",
            f"{EXPERT_PARALLEL} --async-scheduling, a model without experts",
            ask,
            lambda answers: f"{sum(map(len, answers))} tokens",
        ),
    ):
        pass
