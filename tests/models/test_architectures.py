"""A tiny checkpoint of each architecture under `--spark`: its greedy answers equal stock vLLM's, one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve.hosts import Host, Hosts
from tests.serve.process import ProcessError
from tests.serve.servers import Server, spark_tp2, stock_tp1

from . import report
from .architectures import ARCHITECTURES, VOCABULARY, make_checkpoint

PROMPT_LENGTHS = (1, 5, 33, 130)
ANSWER_TOKENS = 24
ALWAYS = frozenset({"llama"})
"""Architectures that each run of the tests tries, beside the tiny Qwen3 and Qwen3-MoE of tests/serve."""


def greedy_tokens(server: Server) -> list[list[int]]:
    """The token ids of the answers to prompts of `PROMPT_LENGTHS` token ids, all at once."""
    model = server.client.models.list().data[0].id
    prompts = [
        [(13 * place + 7 * length) % (VOCABULARY - 64) + 3 for place in range(length)] for length in PROMPT_LENGTHS
    ]
    completion = server.client.completions.create(
        model=model,
        prompt=prompts,
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    return [list((choice.model_extra or {})["token_ids"]) for choice in completion.choices]


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.thorough) for name in ARCHITECTURES]
)
def test_the_pair_answers_as_stock(hosts: Hosts, host: Host, name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = make_checkpoint(tmp_path / name, name)
    arguments = ["--dtype", architecture.dtype]
    if architecture.cpu_limit:
        with pytest.raises(ProcessError), stock_tp1(host, model, arguments):
            pass
        assert any(architecture.cpu_limit in log.read_text() for log in host.logs.glob("host0-*-vllm-serve.log"))
        report.record(name, architecture.model, architecture.dtype, f"{report.STOCK_LIMIT}: {architecture.cpu_limit}")
        return
    with stock_tp1(host, model, arguments) as server:
        expected, again = greedy_tokens(server), greedy_tokens(server)
    assert expected == again, "stock vLLM repeats itself"
    assert len({token for answer in expected for token in answer}) > len(PROMPT_LENGTHS), "the answers are not constant"
    with spark_tp2(hosts, model, arguments) as server:
        assert greedy_tokens(server) == expected
        metrics = server.metrics()
        assert set(metrics["vllm_spark_fallbacks_total"].values()) == {0}
        assert min(metrics["vllm_spark_all_reduces_total"].values()) > 0
    report.record(name, architecture.model, architecture.dtype, report.EQUAL)
