"""Images, and a model with code of its own, on a pair; the answers equal stock vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from openai.types.chat import ChatCompletionContentPartImageParam

from tests.serve import prompts
from tests.serve.hosts import Host, Hosts
from tests.serve.servers import Server, spark_tp2, stock_tp1

from . import checkpoints
from .answers import COLOURS, picture_of

ASKED = prompts.PROMPTS[:4]


@pytest.mark.thorough
def test_a_configuration_class_of_the_models_own(hosts: Hosts, host: Host, tiny_moe: Path, tmp_path: Path) -> None:
    with stock_tp1(host, tiny_moe) as server:
        expected = prompts.greedy_tokens(server.client, ASKED)
    model = checkpoints.make_model_with_own_configuration(tmp_path / "own", tiny_moe)
    with spark_tp2(hosts, model, ["--trust-remote-code"]) as server:
        assert prompts.greedy_tokens(server.client, ASKED) == expected


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
        picture: ChatCompletionContentPartImageParam = {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{picture_of(colour)}"},
        }
        chat = server.client.chat.completions.create(
            model=server.client.models.list().data[0].id,
            messages=[{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}],
            temperature=0,
            max_tokens=24,
        )
        answers.append(str(chat.choices[0].message.content))
    return answers
