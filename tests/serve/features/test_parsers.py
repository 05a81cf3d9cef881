"""Parsers of reasoning and of tool calls, in streams and without: the pair's answers have the same parts as stock's.

The model is random, so a grammar makes it write what a parser takes apart; what is in it is the model's choice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.hosts import Hosts
from tests.serve.servers import Server
from vllm_spark.models import tiny

from .checkpoints import TAGS, make_model_with_tags
from .side_by_side import SideBySide, model_of, request, side_by_side

pytestmark = pytest.mark.thorough

ARGUMENTS = (
    *("--reasoning-parser", "qwen3"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *(
        "--structured-outputs-config",
        json.dumps({"enable_in_reasoning": True, "backend": "xgrammar", "disable_any_whitespace": True}),
    ),
)
TOOL = {
    "type": "function",
    "function": {
        "name": "move_desk",
        "parameters": {
            "type": "object",
            "properties": {"desk": {"type": "string", "enum": ["left", "right"]}, "far": {"type": "boolean"}},
            "required": ["desk", "far"],
            "additionalProperties": False,
        },
    },
}
REASONING = "[a-z]{4,12}</think>"
CONTENT = "[a-z]{6}"
CALL = (
    r'<tool_call>\n\{"name": "move_desk", "arguments": \{"desk": "(left|right)", "far": (true|false)\}\}\n</tool_call>'
)
LIKELY_TAGS = {str(tiny.VOCABULARY + number): 60 for number in range(len(TAGS))}
"""Otherwise a tag might be spelled in several tokens, which a model that was trained would not do."""


@pytest.fixture(scope="module")
def both(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SideBySide]:
    model: Path = make_model_with_tags(tmp_path_factory.mktemp("models") / "tags")
    with side_by_side(hosts, model, ARGUMENTS) as servers:
        yield servers


def body(server: Server, regex: str | None, **more: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "model": model_of(server),
        "messages": [{"role": "user", "content": "Which desk is far?"}],
        "temperature": 0,
        "max_tokens": 120,
    }
    if regex is not None:
        asked |= {"structured_outputs": {"regex": regex}, "logit_bias": LIKELY_TAGS}
    return asked | more


def parts_of(message: dict[str, Any]) -> dict[str, Any]:
    """Text, reasoning and calls of a message, or of what the pieces of a stream add up to."""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
    return {
        "content": message.get("content") or "",
        "reasoning": message.get("reasoning") or message.get("reasoning_content") or "",
        "calls": calls,
    }


def added(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the pieces of a stream add up to."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    for piece in pieces:
        message["content"] += piece.get("content") or ""
        message["reasoning"] += piece.get("reasoning") or piece.get("reasoning_content") or ""
        for call in piece.get("tool_calls") or ():
            calls = message["tool_calls"]
            if call["index"] == len(calls):
                calls.append({"function": {"name": "", "arguments": ""}})
            for name in ("name", "arguments"):
                calls[call["index"]]["function"][name] += call["function"].get(name) or ""
    return message


def chat(server: Server, asked: dict[str, Any], *, streamed: bool) -> dict[str, Any]:
    """The parts of an answer, and why it ended."""
    response = request(server, "POST", "/v1/chat/completions", json=asked | {"stream": streamed})
    assert response.status_code == 200, response.text
    if not streamed:
        (choice,) = response.json()["choices"]
        return parts_of(choice["message"]) | {"finish": choice["finish_reason"]}
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    assert len(choices) > 2, "in pieces"
    finish = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return parts_of(added([choice["delta"] for choice in choices])) | {"finish": finish[-1]}


def counted(answer: dict[str, Any]) -> str:
    return (
        f"{len(answer['reasoning'])} characters of reasoning, {len(answer['content'])} of text, "
        f"{len(answer['calls'])} calls"
    )


STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])


def label(asked: str, streamed: bool) -> str:
    return f"{asked}, streamed" if streamed else asked


@STREAMED
def test_reasoning(both: SideBySide, streamed: bool) -> None:
    with both.same(
        "reasoning parser",
        label("qwen3", streamed),
        lambda server: chat(server, body(server, REASONING + CONTENT), streamed=streamed),
        counted,
    ) as answer:
        assert 4 <= len(answer["reasoning"]) <= 12
        assert len(answer["content"]) == 6


@STREAMED
def test_a_tool_call_after_reasoning(both: SideBySide, streamed: bool) -> None:
    with both.same(
        "tool calls",
        label("hermes, tool_choice auto, after reasoning", streamed),
        lambda server: chat(server, body(server, REASONING + CALL, tools=[TOOL]), streamed=streamed),
        counted,
    ) as answer:
        ((name, arguments),) = answer["calls"]
        assert (name, json.loads(arguments).keys()) == ("move_desk", {"desk", "far"})
        assert answer["reasoning"]
        assert answer["finish"] == "tool_calls"


@STREAMED
@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "move_desk"}}],
    ids=["required", "named"],
)
def test_a_tool_call_that_is_asked_for(both: SideBySide, choice: Any, streamed: bool) -> None:
    """vLLM makes the grammar of the call."""
    more = {"tools": [TOOL], "tool_choice": choice, "chat_template_kwargs": {"enable_thinking": False}}
    with both.same(
        "tool calls",
        label(f"tool_choice {choice if isinstance(choice, str) else 'with a name'}", streamed),
        lambda server: chat(server, body(server, None, **more), streamed=streamed),
        counted,
    ) as answer:
        assert answer["calls"][0][0] == "move_desk"
        assert json.loads(answer["calls"][0][1])["desk"] in ("left", "right")


def test_responses_with_reasoning(both: SideBySide) -> None:
    def ask(server: Server) -> list[Any]:
        asked = {"model": model_of(server), "input": "Which desk?", "temperature": 0, "max_output_tokens": 60}
        response = request(server, "POST", "/v1/responses", json=asked)
        assert response.status_code == 200, response.text
        return [(item["type"], item.get("content")) for item in response.json()["output"]]

    with both.same("/v1/responses", "with a reasoning parser", ask, lambda items: f"{len(items)} items") as items:
        assert items
