"""Options of the server on which answers depend: tokenizer, template, defaults, configuration, limits, backends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.adapters import make_adapter
from tests.serve.hosts import Hosts
from tests.serve.prompts import PROMPTS
from tests.serve.servers import Server
from tests.serve.two_users import WITH_ADAPTERS
from vllm_spark.models.tiny import make_tiny_model

from .side_by_side import SideBySide, model_of, request, side_by_side

pytestmark = pytest.mark.thorough

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
TEMPLATE = "{% for message in messages %}<<{{ message.role }}>> {{ message.content }}\n{% endfor %}<<answer>> "
OVERRIDDEN = {"max_new_tokens": 7}
BACKENDS = ("xgrammar", "guidance", "outlines", "lm-format-enforcer")
SCHEMA = {
    "type": "object",
    "properties": {"far": {"type": "boolean"}, "desk": {"type": "string", "enum": ["left", "right"]}},
    "required": ["far", "desk"],
    "additionalProperties": False,
}


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
        lambda server: complete(server)["choices"][0]["token_ids"],
        count_tokens,
    ) as tokens:
        assert len(tokens) == OVERRIDDEN["max_new_tokens"]
        assert tokens == complete(both.pair, temperature=0, max_tokens=len(tokens))["choices"][0]["token_ids"]


def test_a_configuration_that_is_overridden(both: SideBySide, hosts: Hosts, tiny_dense: Path) -> None:
    """Both ranks compute with it: two ranks of stock vLLM do, and the answers to a long prompt are equal."""
    with both.same(
        "--hf-overrides",
        "another rope_theta",
        lambda server: complete(server, prompt=PROMPTS[15], max_tokens=32, logprobs=0)["choices"][0],
        lambda choice: f"{len(choice['token_ids'])} tokens and their probabilities",
    ) as choice:
        assert len(choice["logprobs"]["token_logprobs"]) == 32


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


def test_token_ids_in_and_out(both: SideBySide) -> None:
    def ask(server: Server) -> Any:
        body = {"token_ids": list(range(20, 40)), "sampling_params": {"max_tokens": 16, "temperature": 0.0}}
        response = request(server, "POST", "/inference/v1/generate", json={"model": "desk"} | body)
        return response.json()["choices"][0]["token_ids"]

    with both.same("/inference/v1/generate", "20 token ids", ask, count_tokens) as tokens:
        assert tokens


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_of_structured_output(hosts: Hosts, tiny_dense: Path, backend: str) -> None:
    """A schema and a regular expression, in one batch and speculated, with the backend that the server names."""
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
    arguments = (
        *("--structured-outputs-config", json.dumps({"backend": backend, "disable_any_whitespace": True})),
        *("--speculative-config", json.dumps(speculation)),
    )

    def ask(server: Server) -> list[str]:
        options = {"model": model_of(server), "max_tokens": 60, "temperature": 0, "prompt": [PROMPTS[13], PROMPTS[5]]}
        texts = []
        for structure in ({"json": SCHEMA}, {"regex": r"(desk [0-9]{2}, ){3}"}):
            response = request(server, "POST", "/v1/completions", json=options | {"structured_outputs": structure})
            assert response.status_code == 200, response.text
            texts += [choice["text"] for choice in response.json()["choices"]]
        return texts

    with (
        side_by_side(hosts, tiny_dense, arguments) as both,
        both.same(
            "structured output", f"backend {backend}, with n-grams", ask, lambda texts: f"{len(texts)} texts"
        ) as texts,
    ):
        for text in texts[:2]:
            assert json.loads(text)["desk"] in ("left", "right")


def test_adapters_with_speculation(hosts: Hosts, tiny_dense: Path, tmp_path: Path) -> None:
    """Drafts of n-grams for a model and an adapter in one batch: as without speculation, too."""
    adapter = make_adapter(tmp_path / "adapter", seed=4)
    common = (*WITH_ADAPTERS, "--lora-modules", f"sql={adapter}")
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 1}

    def ask(server: Server) -> list[list[int]]:
        names = [model.id for model in server.client.models.list().data]
        prompts = [PROMPTS[5], PROMPTS[13]]
        options = {"prompt": prompts, "temperature": 0, "max_tokens": 48}
        return [choice["token_ids"] for name in names for choice in complete(server, model=name, **options)["choices"]]

    arguments = (*common, "--speculative-config", json.dumps(speculation))
    with (
        side_by_side(hosts, tiny_dense, arguments) as both,
        both.same("LoRA", "with n-grams", ask, lambda answers: f"{len(answers)} answers") as answers,
    ):
        drafted = "vllm:spec_decode_num_accepted_tokens_total"
        assert both.pair.metrics(drafted)[drafted][""] > 0
        assert answers[:2] != answers[2:]
