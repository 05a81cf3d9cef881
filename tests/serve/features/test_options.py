"""Options of the server on which answers depend: tokenizer, template, defaults, configuration, limits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.hosts import Hosts
from tests.serve.prompts import PROMPTS
from tests.serve.servers import Server
from vllm_spark.models.tiny import make_tiny_model

from .side_by_side import SideBySide, model_of, request, side_by_side

pytestmark = pytest.mark.thorough

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
TEMPLATE = "{% for message in messages %}<<{{ message.role }}>> {{ message.content }}\n{% endfor %}<<answer>> "
OVERRIDDEN = {"max_new_tokens": 24}
"""Also the most that a request may have."""


@pytest.fixture(scope="module")
def both(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SideBySide]:
    """A model without a tokenizer, which is elsewhere, and everything that one may add on the command line."""
    folder = tmp_path_factory.mktemp("options")
    model = make_tiny_model(folder / "model", "dense")
    elsewhere, defaults = folder / "tokenizer", folder / "defaults"
    elsewhere.mkdir()
    for name in TOKENIZER:
        shutil.move(model / name, elsewhere / name)
    defaults.mkdir()
    (defaults / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "max_new_tokens": 30}))
    (folder / "template.jinja").write_text(TEMPLATE)
    arguments = (
        *("--tokenizer", str(elsewhere), "--chat-template", str(folder / "template.jinja")),
        *("--generation-config", str(defaults), "--override-generation-config", json.dumps(OVERRIDDEN)),
        *("--hf-overrides", json.dumps({"rope_theta": 500.0}), "--max-logprobs", "-1"),
        *("--served-model-name", "desk", "tiny", "--max-num-seqs", "1"),
        *("--return-tokens-as-token-ids", "--enable-prompt-tokens-details"),
    )
    with side_by_side(hosts, model, arguments) as servers:
        yield servers


def complete(server: Server, **options: Any) -> Any:
    """The completion, from plain JSON."""
    given = {"model": model_of(server), "prompt": PROMPTS[2], "return_token_ids": True, "ignore_eos": True, **options}
    response = request(server, "POST", "/v1/completions", json=given)
    assert response.status_code == 200, response.text
    return response.json()


def count_tokens(answer: Any) -> str:
    return f"{len(answer)} tokens"


def test_defaults_of_requests(both: SideBySide) -> None:
    """A file's temperature and the command line's number of tokens, for a request that names neither."""
    with both.same(
        "--generation-config, --override-generation-config",
        "a request without options",
        lambda server: complete(server, max_tokens=None)["choices"][0]["token_ids"],
        count_tokens,
    ) as tokens:
        assert len(tokens) == OVERRIDDEN["max_new_tokens"]
        assert tokens == complete(both.pair, temperature=0, max_tokens=len(tokens))["choices"][0]["token_ids"]


def test_a_configuration_that_is_overridden(both: SideBySide) -> None:
    """Both ranks compute with it, as two ranks of stock vLLM do."""
    with both.same(
        "--hf-overrides",
        "another rope_theta",
        lambda server: complete(server, prompt=PROMPTS[15], max_tokens=24, logprobs=0)["choices"][0],
        lambda choice: f"{len(choice['token_ids'])} tokens and their probabilities",
    ) as choice:
        assert len(choice["logprobs"]["token_logprobs"]) == 24


def test_a_template_of_a_file(both: SideBySide) -> None:
    def ask(server: Server) -> list[Any]:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Which desk?"}], "return_token_ids": True}
        answer = request(server, "POST", "/v1/chat/completions", json=body).json()
        (choice,) = answer["choices"]
        prompt = {"model": "tiny", "tokens": answer["prompt_token_ids"]}
        return [request(server, "POST", "/detokenize", json=prompt).json()["prompt"], choice["token_ids"]]

    with both.same(
        "--chat-template, --tokenizer",
        "a file, a folder beside the model",
        ask,
        lambda answer: f"{len(answer[1])} tokens",
    ) as (prompt, _):
        assert prompt == "<<user>> Which desk?\n<<answer>> "


def test_log_probabilities_of_the_whole_vocabulary(both: SideBySide) -> None:
    def ask(server: Server) -> list[int]:
        (row, *_) = complete(server, max_tokens=2, logprobs=-1)["choices"][0]["logprobs"]["top_logprobs"]
        return sorted(row.items(), key=str)

    with both.same(
        "--max-logprobs -1", "logprobs=-1", ask, lambda found: f"{len(found)} tokens, to the last bit"
    ) as found:
        assert len(found) > 1900


def test_one_sequence_at_a_time(both: SideBySide) -> None:
    """Of five answers to a prompt each waits for the one before it."""
    with both.same(
        "--max-num-seqs 1",
        "n=5 with a seed",
        lambda server: [
            choice["token_ids"] for choice in complete(server, n=5, seed=3, temperature=0.9, max_tokens=12)["choices"]
        ],
        lambda answers: f"{len(answers)} answers",
    ) as answers:
        assert len({str(answer) for answer in answers}) == 5


def test_token_counts_and_tokens(both: SideBySide) -> None:
    """What the API server answers by itself, under both names."""

    def ask(server: Server) -> list[Any]:
        tokenized = request(server, "POST", "/tokenize", json={"model": "tiny", "prompt": PROMPTS[6]}).json()
        counted = {"model": "desk", "messages": [{"role": "user", "content": "Which desk?"}], "max_tokens": 1}
        count = request(server, "POST", "/v1/messages/count_tokens", json=counted).json()
        return [tokenized["tokens"], tokenized["max_model_len"], count]

    with both.same("/tokenize, /v1/messages/count_tokens", "under two names", ask, lambda answer: "3 answers") as (
        tokens,
        length,
        _,
    ):
        assert len(tokens) > 10
        assert length == 1024
