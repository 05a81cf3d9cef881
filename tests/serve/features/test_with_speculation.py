"""What a server of n-grams does besides: each backend of structured output, and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serve.adapters import make_adapter
from tests.serve.hosts import Hosts
from tests.serve.prompts import PROMPTS
from tests.serve.servers import Server
from tests.serve.two_users import WITH_ADAPTERS

from .side_by_side import model_of, request, side_by_side

pytestmark = pytest.mark.thorough

NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
SPECULATION = ("--speculative-config", json.dumps(NGRAMS))
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
NO_WHITE_SPACE = {"disable_any_whitespace": True}
"""A random model might write white space without end; not every backend can forbid it."""

BACKENDS: dict[str, dict[str, Any]] = {
    "xgrammar": NO_WHITE_SPACE,
    "guidance": NO_WHITE_SPACE,
    "outlines": {},
    "lm-format-enforcer": {},
}
SCHEMA = {
    "type": "object",
    "properties": {"far": {"type": "boolean"}, "desk": {"type": "string", "enum": ["left", "right"]}},
    "required": ["far", "desk"],
    "additionalProperties": False,
}


def complete(server: Server, **options: Any) -> list[Any]:
    """The choices of two greedy answers in one batch."""
    given = {"model": model_of(server), "prompt": [PROMPTS[5], PROMPTS[13]], "temperature": 0, "max_tokens": 48}
    response = request(server, "POST", "/v1/completions", json=given | {"return_token_ids": True} | options)
    assert response.status_code == 200, response.text
    choices: list[Any] = response.json()["choices"]
    return choices


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_of_structured_output(hosts: Hosts, tiny_dense: Path, backend: str) -> None:
    """A schema and a regular expression."""
    config = {"backend": backend} | BACKENDS[backend]
    arguments = ("--structured-outputs-config", json.dumps(config), *SPECULATION)

    def ask(server: Server) -> list[str]:
        structures: list[dict[str, Any]] = [{"json": SCHEMA}, {"regex": r"(desk [0-9]{2}, ){3}"}]
        return [choice["text"] for each in structures for choice in complete(server, structured_outputs=each)]

    with (
        side_by_side(hosts, tiny_dense, arguments) as both,
        both.same(
            "structured output", f"backend {backend}, with n-grams", ask, lambda texts: f"{len(texts)} texts"
        ) as texts,
    ):
        assert all(text.startswith("desk ") for text in texts[2:])
        if BACKENDS[backend]:
            assert all(json.loads(text)["desk"] in ("left", "right") for text in texts[:2])


def test_adapters(hosts: Hosts, tiny_dense: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", seed=4)
    arguments = (*WITH_ADAPTERS, "--lora-modules", f"sql={adapter}", *SPECULATION)

    def ask(server: Server) -> list[list[int]]:
        names = [model.id for model in server.client.models.list().data]
        return [choice["token_ids"] for name in names for choice in complete(server, model=name)]

    with (
        side_by_side(hosts, tiny_dense, arguments) as both,
        both.same("LoRA", "with n-grams", ask, lambda answers: f"{sum(map(len, answers))} tokens") as answers,
    ):
        assert both.pair.metrics(ACCEPTED)[ACCEPTED][""] > 0
        assert answers[:2] != answers[2:]
