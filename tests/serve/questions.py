"""Everything that a client may ask, as named questions whose answers two servers must give alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from .prompts import PROMPTS

Question = Callable[[OpenAI, str], Any]

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def ask_all(client: OpenAI) -> dict[str, Any]:
    """The answer to every question, by its name; an API error counts as an answer too."""
    model = client.models.list().data[0].id
    return {name: question(client, model) for name, question in QUESTIONS.items()}


def _complete(client: OpenAI, model: str, prompt: str = PROMPTS[1], **options: Any) -> Any:
    extra = {"return_token_ids": True, **options.pop("extra_body", {})}
    options = {"max_tokens": 24, "temperature": 0, **options}
    return client.completions.create(model=model, prompt=prompt, extra_body=extra, **options)


def _tokens(completion: Any) -> list[list[int]]:
    choices = sorted(completion.choices, key=lambda choice: choice.index)
    return [choice.model_extra["token_ids"] for choice in choices]


def _chat(client: OpenAI, model: str) -> Any:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Which desk holds rank 1?"}]
    reply = client.chat.completions.create(model=model, messages=messages, max_tokens=24, temperature=0)
    return reply.choices[0].message.content, reply.choices[0].finish_reason


def _chat_stream(client: OpenAI, model: str) -> Any:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name the wire."},
    ]
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in stream:
        usage = chunk.usage.completion_tokens if chunk.usage else usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    return text, usage


def _responses(client: OpenAI, model: str) -> Any:
    answer = client.responses.create(model=model, input="Which desk?", max_output_tokens=24, temperature=0)
    assert answer.usage is not None
    return answer.output_text, answer.status, answer.usage.output_tokens


def _responses_stream(client: OpenAI, model: str) -> Any:
    stream = client.responses.create(model=model, input="Whose?", max_output_tokens=24, temperature=0, stream=True)
    events = list(stream)
    return "".join(event.delta for event in events if event.type == "response.output_text.delta"), events[-1].type


def _completion_stream(client: OpenAI, model: str) -> Any:
    stream = client.completions.create(model=model, prompt=PROMPTS[4], max_tokens=24, temperature=0, stream=True)
    return "".join(chunk.choices[0].text for chunk in stream)


def _several(client: OpenAI, model: str) -> Any:
    return _tokens(_complete(client, model, n=2, seed=7, temperature=0.9))


def _seeded(client: OpenAI, model: str) -> Any:
    return [_tokens(_complete(client, model, seed=seed, temperature=1.0, top_p=0.9)) for seed in (1, 2, 1)]


def _log_probabilities(client: OpenAI, model: str) -> Any:
    choice = _complete(client, model, logprobs=5, max_tokens=8).choices[0]
    return [round(value, 3) for value in choice.logprobs.token_logprobs]


def _prompt_log_probabilities(client: OpenAI, model: str) -> Any:
    choice = _complete(client, model, max_tokens=2, extra_body={"prompt_logprobs": 2}).choices[0]
    return [
        sorted((token, round(entry["logprob"], 3)) for token, entry in (position or {}).items())
        for position in choice.model_extra["prompt_logprobs"]
    ]


def _stop(client: OpenAI, model: str) -> Any:
    whole = _complete(client, model, max_tokens=40).choices[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    stopped = _complete(client, model, max_tokens=40, stop=[stop]).choices[0]
    assert len(stopped.text) < len(whole), (whole, stop, stopped.text)
    return stopped.text, stopped.finish_reason


def _json_schema(client: OpenAI, model: str) -> Any:
    format_ = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    answer = _complete(client, model, max_tokens=60, extra_body={"response_format": format_})
    return _tokens(answer), answer.choices[0].text


def _regular_expression(client: OpenAI, model: str) -> Any:
    answer = _complete(client, model, extra_body={"structured_outputs": {"regex": r"[a-f]{4}-\d{3}"}})
    return answer.choices[0].text


def _penalties(client: OpenAI, model: str) -> Any:
    return _tokens(_complete(client, model, presence_penalty=1.0, frequency_penalty=0.5, extra_body={"min_tokens": 8}))


def _long_prompt(client: OpenAI, model: str) -> Any:
    prompt = [(7 * position) % 1900 + 5 for position in range(900)]
    answer = client.completions.create(
        model=model, prompt=prompt, max_tokens=24, temperature=0, extra_body={"return_token_ids": True}
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 900
    return _tokens(answer)


def _same_prefix(client: OpenAI, model: str) -> Any:
    prefix = "shared " * 200
    return [_tokens(_complete(client, model, prefix + tail)) for tail in ("one", "two", "one")]


def _errors(client: OpenAI, model: str) -> Any:
    from openai import APIStatusError

    codes = []
    for options in (
        {"max_tokens": 100_000},
        {"temperature": -1.0},
        {"extra_body": {"structured_outputs": {"regex": "["}}},
    ):
        try:
            _complete(client, model, **options)
            codes.append(200)
        except APIStatusError as error:
            codes.append(error.status_code)
    return codes


QUESTIONS: dict[str, Question] = {
    "chat": _chat,
    "chat, streamed": _chat_stream,
    "completion, streamed": _completion_stream,
    "/v1/responses": _responses,
    "/v1/responses, streamed": _responses_stream,
    "n=2": _several,
    "seeds": _seeded,
    "log probabilities": _log_probabilities,
    "prompt log probabilities": _prompt_log_probabilities,
    "stop string": _stop,
    "JSON schema": _json_schema,
    "regular expression": _regular_expression,
    "penalties": _penalties,
    "chunked prefill of 900 tokens": _long_prompt,
    "prefix cache": _same_prefix,
    "bad requests": _errors,
}
