"""Options of requests that need options of the server: prompts as embeddings, priorities, salts of the prefix cache."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tests.serve.hosts import Hosts
from tests.serve.prompts import PROMPTS
from tests.serve.servers import Server

from .side_by_side import SideBySide, model_of, request, side_by_side

pytestmark = pytest.mark.thorough

ARGUMENTS = (
    "--enable-prompt-embeds",
    *("--scheduling-policy", "priority", "--max-num-seqs", "2"),
    "--enable-prefix-caching",
    *("--max-logprobs", "20", "--return-tokens-as-token-ids"),
)
HITS, WAITING = "vllm:prefix_cache_hits_total", "vllm:num_requests_waiting"


@pytest.fixture(scope="module")
def both(hosts: Hosts, tiny_dense: Path) -> Iterator[SideBySide]:
    with side_by_side(hosts, tiny_dense, ARGUMENTS) as servers:
        yield servers


def complete(server: Server, **options: Any) -> Any:
    """The completion, from plain JSON."""
    given = {"model": model_of(server), "max_tokens": 16, "temperature": 0, "return_token_ids": True, **options}
    response = request(server, "POST", "/v1/completions", json=given)
    assert response.status_code == 200, response.text
    return response.json()


def tokens(completion: Any) -> list[list[int]]:
    return [choice["token_ids"] for choice in completion["choices"]]


def count_tokens(answers: list[list[int]]) -> str:
    return f"{sum(map(len, answers))} tokens"


def test_prompts_as_embeddings(both: SideBySide, tiny_dense: Path) -> None:
    """Those of a prompt's tokens get the answer of that prompt."""
    ids = Tokenizer.from_file(str(tiny_dense / "tokenizer.json")).encode(PROMPTS[2]).ids
    rows = load_file(tiny_dense / "model.safetensors")["model.embed_tokens.weight"][ids].float()
    buffer = io.BytesIO()
    torch.save(rows, buffer)
    embeds = base64.b64encode(buffer.getvalue()).decode()
    with both.same(
        "prompt embeddings",
        f"{len(ids)} embeddings in place of a prompt",
        lambda server: tokens(complete(server, prompt_embeds=embeds)),
        count_tokens,
    ) as answer:
        assert answer == tokens(complete(both.pair, prompt=ids))


def test_log_probabilities_of_a_prompt(both: SideBySide) -> None:
    def ask(server: Server) -> list[Any]:
        (choice,) = complete(server, prompt=PROMPTS[4], prompt_logprobs=20, logprobs=20, ignore_eos=True)["choices"]
        return [choice["prompt_logprobs"], choice["logprobs"], choice["token_ids"]]

    with both.same(
        "log-probabilities",
        "20 for each token of prompt and answer",
        ask,
        lambda answer: f"{len(answer[0])} tokens of the prompt, {len(answer[2])} of the answer, to the last bit",
    ) as (prompt, own, _):
        assert all(len(position) >= 20 for position in prompt[1:])
        assert len(set(own["token_logprobs"])) > 8


def test_several_answers_with_their_log_probabilities(both: SideBySide) -> None:
    def ask(server: Server) -> list[Any]:
        choices = complete(server, prompt=PROMPTS[5], n=5, seed=9, temperature=0.9, logprobs=3)["choices"]
        return [[choice["token_ids"], choice["logprobs"]["token_logprobs"]] for choice in choices]

    with both.same(
        "n > 1", "n=5 with a seed, and log-probabilities", ask, lambda answer: f"{len(answer)} answers, to the last bit"
    ) as answers:
        assert len({str(each) for each in answers}) == 5


@pytest.mark.parametrize(
    "structure",
    [
        {"choice": ["the left desk", "the right desk"]},
        {"regex": r"[a-f]{4}-\d{3}"},
        {"json": {"type": "object", "properties": {"far": {"type": "boolean"}}, "required": ["far"]}},
        {"grammar": 'root ::= "desk " ("0" | "1")'},
        {"json_object": True},
    ],
    ids=lambda structure: next(iter(structure)),
)
def test_structured_output(both: SideBySide, structure: dict[str, Any]) -> None:
    """Of two requests in a batch, one without, and of two answers to each."""

    def ask(server: Server) -> list[Any]:
        with ThreadPoolExecutor(2) as pool:
            free = pool.submit(complete, server, prompt=PROMPTS[1], max_tokens=40)
            bound = complete(server, prompt=PROMPTS[6], structured_outputs=structure, max_tokens=40)
            return [[choice["text"] for choice in each["choices"]] for each in (bound, free.result())]

    asked = f"{next(iter(structure))}, beside a free request"
    with both.same("structured output", asked, ask, lambda answer: f"{len(answer)} texts") as (bound, _):
        if "choice" in structure:
            assert bound[0] in structure["choice"]


def test_salts_of_the_prefix_cache(both: SideBySide) -> None:
    """The same prompt is found in the cache by the requests with its salt, and by no other."""
    prompt = list(range(5, 305))

    def ask(server: Server) -> list[Any]:
        answers: list[Any] = []
        for salt in ("one", "one", "two", None):
            before = server.metrics(HITS)[HITS][""]
            answers.append(tokens(complete(server, prompt=prompt, **({"cache_salt": salt} if salt else {}))))
            answers.append([int(server.metrics(HITS)[HITS][""] - before)])
        return answers

    with both.same(
        "prefix cache", "four requests with two salts and with none", ask, lambda answers: f"hits {answers[1::2]}"
    ) as answers:
        first, *others = answers[::2]
        assert all(each == first for each in others)
        assert [hits[0] > 0 for hits in answers[1::2]] == [False, True, False, False]


def test_priorities(both: SideBySide) -> None:
    """Of what waits for one of two places, the most urgent comes first, whenever it was sent."""
    numbers = itertools.count()

    def ask(server: Server) -> list[int]:
        ended: list[int] = []

        def answer(priority: int, length: int) -> None:
            prompt = f"request {next(numbers)}"
            complete(server, prompt=prompt, priority=priority, max_tokens=length, ignore_eos=True)
            ended.append(priority)

        with ThreadPoolExecutor(8) as pool:
            for _ in range(2):
                pool.submit(answer, -1, 300)
            server.leader.wait_until(lambda: server.labelled("vllm:num_requests_running") == 2, 60, "fill both places")
            for place, priority in enumerate((4, 2, 3, 1), start=1):
                pool.submit(answer, priority, 20 * priority)
                waiting = place
                server.leader.wait_until(
                    lambda waiting=waiting: server.metrics(WAITING)[WAITING][""] == waiting,  # type: ignore[misc]
                    60,
                    "let it wait",
                )
        return ended

    with both.same("priorities", "four requests in the queue", ask, lambda order: f"order {order[2:]}") as order:
        assert order == [-1, -1, 1, 2, 3, 4]
