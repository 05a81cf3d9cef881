"""LoRA adapters: of the command line, of requests in one batch, loaded and unloaded while the server runs, evicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serve.adapters import make_adapter
from tests.serve.hosts import Hosts
from tests.serve.prompts import PROMPTS
from tests.serve.servers import Server
from tests.serve.two_users import RUNTIME_LORA, WITH_ADAPTERS, load_adapter

from .side_by_side import SideBySide, model_of, request, side_by_side

pytestmark = pytest.mark.thorough

Answers = list[list[int]]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / f"number {seed}", seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def both(hosts: Hosts, tiny_dense: Path, adapters: list[Path]) -> Iterator[SideBySide]:
    static = ("--lora-modules", f"static={adapters[0]}")
    with side_by_side(hosts, tiny_dense, (*WITH_ADAPTERS, *static), RUNTIME_LORA) as servers:
        yield servers


def tokens(server: Server, names: Sequence[str]) -> Answers:
    """Greedy answers to one prompt, by the adapters of these names, which are asked at the same time."""

    def ask(name: str) -> list[int]:
        options = {"max_tokens": 32, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        response = request(server, "POST", "/v1/completions", json={"model": name, "prompt": PROMPTS[2], **options})
        assert response.status_code == 200, response.text
        ids: list[int] = response.json()["choices"][0]["token_ids"]
        return ids

    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(ask, names))


def count(answers: Answers) -> str:
    return f"{sum(map(len, answers))} tokens"


def test_an_adapter_of_the_command_line(both: SideBySide) -> None:
    with both.same(
        "LoRA", "--lora-modules, in one batch with the model", lambda s: tokens(s, [model_of(s), "static"]), count
    ) as (without, with_it):
        assert without != with_it


def test_adapters_that_are_loaded_and_unloaded(both: SideBySide, adapters: list[Path]) -> None:
    """Three, of which two have room: each request may need one that was evicted."""

    def load(server: Server) -> list[int]:
        return [load_adapter(server, f"loaded {number}", adapters[number]).status_code for number in (1, 2, 1)]

    with both.same(
        "LoRA", "/v1/load_lora_adapter, one of them twice", load, lambda found: f"statuses {found}"
    ) as statuses:
        assert statuses == [200, 200, 400]
    names = ["static", "loaded 1", "loaded 2"]
    with both.same(
        "LoRA", "three adapters, room for two", lambda s: [tokens(s, [name])[0] for name in names * 2], count
    ) as one_by_one:
        assert one_by_one[:3] == one_by_one[3:]
        assert len({str(answer) for answer in one_by_one}) == 3
    with both.same("LoRA", "three adapters in one moment", lambda s: tokens(s, names), count) as together:
        assert together == one_by_one[:3]

    def unload(server: Server) -> list[int]:
        body = {"lora_name": "loaded 1"}
        statuses = [request(server, "POST", "/v1/unload_lora_adapter", json=body).status_code for _ in range(2)]
        asked = {"model": "loaded 1", "prompt": "a", "max_tokens": 1}
        return [*statuses, request(server, "POST", "/v1/completions", json=asked).status_code]

    with both.same(
        "LoRA", "/v1/unload_lora_adapter, then a request", unload, lambda found: f"statuses {found}"
    ) as statuses:
        assert statuses == [200, 404, 404]


def test_the_list_of_models(both: SideBySide) -> None:
    def ask(server: Server) -> list[list[str | None]]:
        models = [model.model_dump() for model in server.client.models.list().data]
        return [[model["id"], model["parent"]] for model in models]

    with both.same("LoRA", "/v1/models", ask, lambda models: f"{len(models)} models") as models:
        assert next(name for name, parent in models if parent) == "static"
