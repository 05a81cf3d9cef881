"""Every method of speculation under `--spark`: tokens as without it, and drafts and acceptance as stock vLLM's.

The models can be guessed (`speculators`), so that some drafts are accepted and some are not. Stock vLLM is one rank:
both ranks of a pair have the same tokens, and so the same drafts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, OpenAI

from tests.report import vllm_version
from tests.serve import prompts
from tests.serve.counters import settled
from tests.serve.development import DEVELOPMENT, EXTENSION, call
from tests.serve.hosts import Host, Hosts
from tests.serve.process import ProcessError
from tests.serve.questions import DRAWN, QUESTIONS
from tests.serve.servers import Server, spark_tp2, stock_tp1, stock_tp2

from . import report, speculators
from .speculators import MTP_MODELS

ASKED = (*prompts.PROMPTS[:4], "1, 2, 3, 1, 2, 3, 1, 2, 3, ")
ANSWER_TOKENS = 48
DRAFTED = 3
TARGET_CLASS = "Qwen3MoeForCausalLM"


@dataclass(frozen=True)
class Method:
    """One way to speculate.

    Attributes:
        settings: of `--speculative-config`, in addition to the draft.
        make: makes the draft in a folder for a target; None for methods without one.
        accepts: whether some drafts are accepted.
        package: what it needs installed.
        cpu_limit: what stock vLLM prints when it cannot do it; empty if it can.
        drafted: tokens in each step.
        label: of its row, in place of the method's name.
    """

    settings: dict[str, Any]
    make: Callable[[Path, Path], Path] | None = None
    accepts: bool = True
    package: str = ""
    cpu_limit: str = ""
    drafted: int = DRAFTED
    label: str = ""

    def arguments(self, folder: Path, target: Path) -> list[str]:
        """Arguments of `vllm serve`, with the draft made."""
        settings = {"num_speculative_tokens": self.drafted} | self.settings
        if self.make is not None:
            settings["model"] = str(self.make(folder, target))
        return ["--speculative-config", json.dumps(settings)]

    @property
    def row(self) -> str:
        """What the table says of it."""
        tokens = "1 token" if self.drafted == 1 else f"{self.drafted} tokens"
        return f"{self.label or self.settings['method']}, {tokens}"


def _small_vocabulary(folder: Path, target: Path) -> Path:
    return speculators.make_eagle3_head(folder, target, speculators.HEAD_VOCABULARY)


METHODS = {
    "eagle3": Method({"method": "eagle3"}, speculators.make_eagle3_head),
    "eagle": Method({"method": "eagle"}, speculators.make_eagle_head),
    "small_vocabulary": Method(
        # vLLM ignores this number of ranks for a head.
        {"method": "eagle3", "draft_tensor_parallel_size": 1},
        _small_vocabulary,
        label=f"eagle3 with a vocabulary of {speculators.HEAD_VOCABULARY}",
    ),
    "local_argmax": Method(
        {"method": "eagle3", "use_local_argmax_reduction": True},
        speculators.make_eagle3_head,
        label="eagle3 with use_local_argmax_reduction",
    ),
    "draft_model": Method({"method": "draft_model"}, speculators.make_draft_model),
    "itself": Method({"method": "draft_model"}, lambda folder, target: target, label="draft_model, the model itself"),
    "ngram": Method({"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}),
    "suffix": Method({"method": "suffix"}, package="arctic_inference"),
    "medusa": Method({"method": "medusa"}, speculators.make_medusa_heads, drafted=speculators.MEDUSA_HEADS),
    "dflash": Method({"method": "dflash"}, speculators.make_dflash_draft, accepts=False),
    "mlp_speculator": Method(
        {"method": "mlp_speculator"},
        lambda folder, target: speculators.make_mlp_speculator(folder),
        cpu_limit="Model architectures ['MLPSpeculatorPreTrainedModel'] are not supported",
    ),
}
ALWAYS = frozenset({"eagle3"})
"""What each run of the tests tries, beside the n-grams of tests/serve."""


@dataclass(frozen=True)
class Measured:
    """What a server answered, and how many tokens it drafted and accepted for that."""

    tokens: list[list[int]]
    drafted: int
    accepted: int


def drafts(server: Server) -> tuple[int, int]:
    """How many tokens were drafted and accepted so far."""
    values = server.metrics("vllm:spec_decode_num_")
    names = ("vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")
    drafted, accepted = (int(values.get(name, {}).get("", 0)) for name in names)
    return drafted, accepted


def measured(server: Server, asked: Sequence[str] = ASKED) -> Measured:
    """The answers to prompts, one after the other, of a server that has answered nothing else."""
    tokens = prompts.greedy_tokens(server.client, asked, max_tokens=ANSWER_TOKENS, concurrency=1)
    name = "vllm:generation_tokens_total"
    expected = ANSWER_TOKENS * len(asked)
    server.leader.wait_until(lambda: server.metrics(name)[name][""] == expected, 20, f"count {expected} tokens")
    return Measured(tokens, *drafts(server))


def collectives(server: Server) -> str:
    """How many collectives the first rank had; no rank had one that used vLLM's own path."""
    metrics = settled(server)
    assert set(metrics["vllm_spark_fallbacks_total"].values()) == {0}
    reduces, gathers = (int(metrics[f"vllm_spark_{kind}_total"]["0"]) for kind in ("all_reduces", "all_gathers"))
    assert min(reduces, gathers) > 0
    return f"{reduces} all-reduces, {gathers} all-gathers, 0 fallbacks"


def compare(
    hosts: Hosts,
    model: Path,
    plain: list[list[int]] | None,
    arguments: Sequence[str],
    *,
    asked: Sequence[str] = ASKED,
    accepts: bool = True,
    then: Callable[[Server], None] | None = None,
) -> str:
    """Serves `model` with speculation by stock vLLM and by a pair; returns the result for the table.

    Args:
        hosts: of the pair.
        model: its folder.
        plain: the answers without speculation, which both must give. None compares with two ranks of stock vLLM: for
            bfloat16, in which a step of several tokens has other roundings than a step of one, and one rank than two.
        arguments: of `vllm serve`.
        asked: the prompts.
        accepts: whether some drafts must be accepted.
        then: what else is tried with the pair.
    """
    with stock_tp2(hosts, model, arguments) if plain is None else stock_tp1(hosts[0], model, arguments) as server:
        stock = measured(server, asked)
    assert plain in (None, stock.tokens)
    assert stock.drafted > 0
    extension, environment = ((), {}) if then is None else (EXTENSION, DEVELOPMENT)
    with spark_tp2(hosts, model, [*arguments, *extension], environment) as server:
        pair = measured(server, asked)
        counted = collectives(server)
        if then is not None:
            then(server)
    assert pair == stock
    assert (pair.accepted > 0) == accepts
    peer = ", as two ranks of stock vLLM" if plain is None else ""
    return f"{report.EQUAL}: {pair.drafted} drafted, {pair.accepted} accepted{peer}; {counted}"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the drafts are made for."""
    return speculators.make_target(tmp_path_factory.mktemp("target") / "model")


@pytest.fixture(scope="module")
def plain_tokens(host: Host, target: Path) -> list[list[int]]:
    """What stock vLLM answers with `target`, without speculation."""
    with stock_tp1(host, target) as server:
        return measured(server).tokens


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.thorough) for name in METHODS]
)
def test_a_method(hosts: Hosts, host: Host, target: Path, name: str, tmp_path: Path, request: Any) -> None:
    method = METHODS[name]
    if method.package and find_spec(method.package) is None:
        pytest.skip(f"needs the package {method.package}")
    arguments = method.arguments(tmp_path / "draft", target)
    if method.cpu_limit:
        with pytest.raises(ProcessError), stock_tp1(host, target, arguments):
            pass
        assert any(method.cpu_limit in log.read_text() for log in host.logs.glob("host0-*-vllm-serve.log"))
        report.record(
            "qwen3_moe", TARGET_CLASS, "float32", f"{report.STOCK_LIMIT}: {method.cpu_limit}", speculation=method.row
        )
        return
    plain = request.getfixturevalue("plain_tokens")
    result = compare(hosts, target, plain, arguments, accepts=method.accepts, then=THEN.get(name))
    report.record("qwen3_moe", TARGET_CLASS, "float32", result, speculation=method.row)


@pytest.mark.thorough
def test_a_head_that_names_its_model(hosts: Hosts, target: Path, plain_tokens: list[list[int]], tmp_path: Path) -> None:
    """`vllm serve HEAD`, with a head in the format of the library speculators."""
    head = speculators.make_speculators_head(tmp_path / "head", target)
    result = compare(hosts, head, plain_tokens, [])
    label = "eagle3 in the format of speculators, 3 tokens"
    report.record("qwen3_moe", TARGET_CLASS, "float32", result, speculation=label)


@pytest.mark.thorough
@pytest.mark.parametrize("name", MTP_MODELS)
def test_layers_that_predict_more_than_one_token(hosts: Hosts, host: Host, name: str, tmp_path: Path) -> None:
    architecture = MTP_MODELS[name]
    model = speculators.make_mtp_model(tmp_path / name, name)
    method = Method({"method": "mtp"}, drafted=architecture.drafted)
    common = ["--dtype", architecture.dtype, *architecture.arguments]
    asked = ASKED[1:] if architecture.several_tokens else ASKED  # the first one is a single token
    arguments = [*common, *method.arguments(tmp_path, model)]
    if limit := architecture.cpu_limits.get(vllm_version()):
        with pytest.raises((ProcessError, APIError)), stock_tp2(hosts, model, arguments) as server:
            measured(server, asked)
        assert any(limit in log.read_text() for log in host.logs.glob("host0-*-vllm-serve.log"))
        result = f"{report.STOCK_LIMIT}: {limit}"
        report.record(name, architecture.model_class, architecture.dtype, result, speculation=method.row)
        return
    plain = None
    if architecture.dtype == "float32":
        with stock_tp1(host, model, common) as server:
            plain = measured(server).tokens
    result = compare(hosts, model, plain, arguments, asked=asked)
    report.record(name, architecture.model_class, architecture.dtype, result, speculation=method.row)


SMALL_BATCHES = ("--max-num-batched-tokens", "256", "--enable-chunked-prefill", "--enable-prefix-caching")
GREEDY = [name for name in QUESTIONS if name not in (*DRAWN, "logit_bias")]
"""Questions that are answered without chance: vLLM's CPU build reads the temperature of drafts from memory that nothing
has written, so that only the pair, where that is corrected, answers the others twice alike. vLLM does not speculate
with a bias of tokens."""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "scheduling"),
    [("eagle3", "--async-scheduling"), ("draft_model", "--no-async-scheduling"), ("ngram", "")],
)
def test_with_other_features(hosts: Hosts, target: Path, name: str, scheduling: str, tmp_path: Path) -> None:
    """Structured output, chunked prefill, log-probabilities, streams, stop strings, cached prefixes."""
    method = METHODS[name]
    arguments = [*method.arguments(tmp_path / "draft", target), *SMALL_BATCHES, *filter(None, [scheduling])]

    def answers(server: Server) -> dict[str, Any]:
        model = server.client.models.list().data[0].id
        return {question: QUESTIONS[question](server.client, model) for question in GREEDY}

    with stock_tp1(hosts[0], target, arguments) as server:
        expected, counts = answers(server), drafts(server)
    with spark_tp2(hosts, target, arguments) as server:
        given = answers(server)
        assert given == expected
        server.leader.wait_until(lambda: drafts(server) == counts, 20, f"draft and accept {counts} tokens")
        collectives(server)
        assert_several_answers(server.client)
    assert counts[1] > 0


def assert_several_answers(client: OpenAI) -> None:
    """Several answers to one prompt, and seeds; answers that are drawn so cold are greedy ones."""
    model = client.models.list().data[0].id
    (greedy,) = prompts.greedy_tokens(client, prompts.PROMPTS[4:5], max_tokens=32)

    def ask(**options: Any) -> list[list[int]]:
        extra = {"return_token_ids": True, "ignore_eos": True}
        answer = client.completions.create(
            model=model, prompt=prompts.PROMPTS[4], max_tokens=32, extra_body=extra, **options
        )
        return [list((choice.model_extra or {})["token_ids"]) for choice in answer.choices]

    assert ask(n=3, temperature=0.01) == [greedy] * 3
    one, other, again = (ask(temperature=1.0, seed=seed) for seed in (1, 2, 1))
    assert one == again != other
    several = ask(n=3, temperature=1.0, seed=1)
    assert len({tuple(tokens) for tokens in several}) == 3


def assert_different_drafts_are_found(server: Server) -> None:
    """One rank drafts another token once: found with the next step, although that rank's drafts are not even used."""
    assert_drift_is_found(server, "draft_otherwise_once_on", r"drafted different tokens for step \d+ ")


def assert_different_acceptance_is_found(server: Server) -> None:
    """One rank accepts a draft less than the other."""
    assert_drift_is_found(server, "accept_less_once_on", r"sampled different tokens at step \d+ ")


def assert_drift_is_found(server: Server, fault: str, message: str) -> None:
    """Calls a method of the worker extension for rank 1 within an answer, and reads how that ends."""
    stream = server.client.completions.create(
        model=server.client.models.list().data[0].id,
        prompt=ASKED[0],
        max_tokens=900,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    iterator = iter(stream)
    next(iterator)
    call(server, fault, 1)
    with pytest.raises(APIError):
        for _ in iterator:
            pass
    server.leader.wait_for_line(rf"the ranks {message}.* start vllm serve again", 10)
    assert server.leader.wait(30) != 0


THEN = {"eagle3": assert_different_drafts_are_found, "itself": assert_different_acceptance_is_found}
"""What else is tried with the pair of a method, as the last thing."""
