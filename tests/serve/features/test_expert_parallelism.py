"""Expert parallelism, which stock vLLM's CPU build does not survive."""

from __future__ import annotations

from pathlib import Path

import pytest
from openai import OpenAIError

from tests.serve import prompts
from tests.serve.hosts import Hosts
from tests.serve.process import ProcessError
from tests.serve.servers import stock_tp2

from .report import STOCK_LIMIT, record

pytestmark = pytest.mark.thorough


def test_stock_vllm_ends(hosts: Hosts, tiny_moe: Path) -> None:
    """At the first step of its kernel for experts, in the start or with the first prompt."""
    with (
        pytest.raises((ProcessError, OpenAIError)),
        stock_tp2(hosts, tiny_moe, ["--enable-expert-parallel"]) as server,
    ):
        prompts.greedy_tokens(server.client, prompts.PROMPTS[:1])
    record("--enable-expert-parallel", "a prompt", f"{STOCK_LIMIT}: SIGSEGV in `cpu_fused_moe`")
