"""Stock vLLM on this machine: if this fails, the ground under all other tests is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import process, prompts
from .hosts import Hosts
from .servers import stock_tp2


@pytest.mark.thorough
def test_one_rank_and_two_ranks_over_two_hosts_agree(
    hosts: Hosts, tiny_moe: Path, reference_tokens: list[list[int]]
) -> None:
    with stock_tp2(hosts, tiny_moe) as server:
        tokens = prompts.greedy_tokens(server.client)
        assert all(rank.descendants() for rank in server.processes), "both hosts have a worker"
    process.assert_all_gone(*server.processes)
    assert tokens == reference_tokens
    assert len({tuple(answer) for answer in tokens}) > len(tokens) // 2, "the answers differ from each other"
