"""A tiny checkpoint of each architecture under `--spark`: its answers equal stock vLLM's on two ranks, to the last bit.

Tokens and the logarithms of their probabilities are compared, or the numbers of a pooling model. One rank multiplies
matrices that two split, so that its sums have other roundings; two ranks of stock vLLM do the same sums as the pair.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from openai import OpenAIError

from tests.serve.counters import settled
from tests.serve.hosts import Host, Hosts
from tests.serve.process import ProcessError
from tests.serve.servers import Server, spark_tp2, stock_tp1, stock_tp2

from . import report
from .answers import Answers, generated_together
from .architectures import ARCHITECTURES, Architecture
from .random_weights import make_checkpoint


@pytest.mark.thorough
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_pair_answers_as_stock(hosts: Hosts, host: Host, name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = make_checkpoint(tmp_path / name, architecture)
    arguments = architecture.serve_arguments
    if architecture.cpu_limit:
        assert_stock_ends_with(architecture.cpu_limit, host, model, architecture)
        result = f"{report.STOCK_LIMIT}: `{architecture.cpu_limit}`"
    else:
        with stock_tp2(hosts, model, arguments) as server:
            expected = answers_of(server, architecture)
        with spark_tp2(hosts, model, arguments) as server:
            assert answers_of(server, architecture) == expected
            result = f"{report.EQUAL}: {expected.counted}; {collectives(server)}, 0 fallbacks"
    report.record(name, architecture.model_class, architecture.dtype, result)


def answers_of(server: Server, architecture: Architecture) -> Answers:
    """The answers to prompts that come one by one; those that come together have the same tokens, if stock's have."""
    lengths = architecture.prompt_lengths
    given = architecture.ask(server, lengths)
    if architecture.generates and architecture.together:
        assert generated_together(server, lengths) == given.tokens[: len(lengths)]
    return given


def assert_stock_ends_with(message: str, host: Host, model: Path, architecture: Architecture) -> None:
    """Stock vLLM does not start, or its engine ends at the first prompt, and it prints this."""
    before = set(host.logs.iterdir())
    with (
        pytest.raises((ProcessError, OpenAIError)),
        stock_tp1(host, model, architecture.serve_arguments) as server,
    ):
        architecture.ask(server, architecture.prompt_lengths)
    (log,) = set(host.logs.iterdir()) - before
    assert message in log.read_text()


def collectives(server: Server) -> str:
    """How many collectives the first rank had; no rank had one that used vLLM's own path."""
    metrics = settled(server)
    assert set(metrics["vllm_spark_fallbacks_total"].values()) == {0}
    reduces, gathers = (int(metrics[f"vllm_spark_{kind}_total"]["0"]) for kind in ("all_reduces", "all_gathers"))
    assert reduces > 0
    return f"{reduces} all-reduces, {gathers} all-gathers"
