"""A pair needs one port of the leader's machine, and no other, either way."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import prompts
from .hosts import Hosts, behind_firewall
from .servers import spark_tp2


@pytest.mark.parametrize("hosts_share_files", [True])
def test_a_firewall_that_lets_one_port_through(
    namespaces: Hosts, tiny_moe: Path, reference_tokens: list[list[int]], hosts_share_files: bool
) -> None:
    first, second = namespaces
    with spark_tp2(namespaces, tiny_moe, wait=False) as server:
        port = server.spark_port
        with behind_firewall(first, port), behind_firewall(second, port):
            server.wait_until_healthy()
            assert prompts.greedy_tokens(server.client, prompts.PROMPTS[:2]) == reference_tokens[:2]
