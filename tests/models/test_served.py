"""What people serve on a pair: drafts, images, a model with code of its own; the answers equal stock vLLM's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.serve import prompts
from tests.serve.hosts import Host, Hosts
from tests.serve.servers import Server, spark_tp2, stock_tp1

from . import checkpoints
from .answers import COLOURS, picture_of

ASKED = prompts.PROMPTS[:4]
DRAFTED = 3


@pytest.fixture(scope="module")
def stock_tokens(host: Host, tiny_moe: Path) -> list[list[int]]:
    """What stock vLLM answers with the tiny MoE, without speculation."""
    with stock_tp1(host, tiny_moe) as server:
        return prompts.greedy_tokens(server.client, ASKED)


def speculation(method: str, model: Path | None = None, tokens: int = DRAFTED) -> list[str]:
    settings: dict[str, object] = {"method": method, "num_speculative_tokens": tokens}
    if model is not None:
        settings["model"] = str(model)
    return ["--speculative-config", json.dumps(settings)]


def assert_no_fallback_and_drafts(server: Server) -> None:
    """Every collective, the draft's too, went through the runtime, and tokens were drafted."""
    assert set(server.metrics()["vllm_spark_fallbacks_total"].values()) == {0}
    assert server.metrics("vllm:spec_decode_num_draft_tokens")["vllm:spec_decode_num_draft_tokens_total"][""] > 0


def test_eagle3(hosts: Hosts, tiny_moe: Path, stock_tokens: list[list[int]], tmp_path: Path) -> None:
    head = checkpoints.make_eagle3_head(tmp_path / "head", tiny_moe)
    with spark_tp2(hosts, tiny_moe, speculation("eagle3", head)) as server:
        assert prompts.greedy_tokens(server.client, ASKED) == stock_tokens
        assert_no_fallback_and_drafts(server)


@pytest.mark.thorough
def test_a_draft_model(hosts: Hosts, tiny_moe: Path, stock_tokens: list[list[int]], tmp_path: Path) -> None:
    draft = checkpoints.make_draft_model(tmp_path / "draft", tiny_moe)
    with spark_tp2(hosts, tiny_moe, speculation("draft_model", draft)) as server:
        assert prompts.greedy_tokens(server.client, ASKED) == stock_tokens
        assert_no_fallback_and_drafts(server)


@pytest.mark.thorough
def test_mtp(hosts: Hosts, host: Host, tmp_path: Path) -> None:
    model = checkpoints.make_model_with_mtp(tmp_path / "mimo")
    with stock_tp1(host, model, ["--trust-remote-code"]) as server:
        expected = prompts.greedy_tokens(server.client, ASKED)
    with spark_tp2(hosts, model, ["--trust-remote-code", *speculation("mtp", tokens=1)]) as server:
        assert prompts.greedy_tokens(server.client, ASKED) == expected
        assert_no_fallback_and_drafts(server)


@pytest.mark.thorough
def test_a_configuration_class_of_the_models_own(
    hosts: Hosts, tiny_moe: Path, stock_tokens: list[list[int]], tmp_path: Path
) -> None:
    model = checkpoints.make_model_with_own_configuration(tmp_path / "own", tiny_moe)
    with spark_tp2(hosts, model, ["--trust-remote-code"]) as server:
        assert prompts.greedy_tokens(server.client, ASKED) == stock_tokens


def test_images(hosts: Hosts, host: Host, tmp_path: Path) -> None:
    model = checkpoints.make_vision_model(tmp_path / "vision")
    with stock_tp1(host, model) as server:
        expected = answers_about_images(server)
    assert len(set(expected)) == len(expected), "the image decides the answer"
    with spark_tp2(hosts, model) as server:
        assert answers_about_images(server) == expected
        assert set(server.metrics()["vllm_spark_fallbacks_total"].values()) == {0}


def answers_about_images(server: Server, colours: Sequence[str] = COLOURS) -> list[str]:
    """What a model says of pictures of one colour each, greedily."""
    answers = []
    for colour in colours:
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture_of(colour)}"}}
        chat = server.client.chat.completions.create(
            model=server.client.models.list().data[0].id,
            messages=[{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}],  # type: ignore[list-item]
            temperature=0,
            max_tokens=24,
        )
        answers.append(str(chat.choices[0].message.content))
    return answers
