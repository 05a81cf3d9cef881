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


def _stop_token(client: OpenAI, model: str) -> Any:
    """A token of the answer ends it, but not before the least number of tokens."""
    (tokens,) = _tokens(_complete(client, model, max_tokens=40, extra_body={"ignore_eos": True}))
    answers = [
        _complete(client, model, max_tokens=40, extra_body={"stop_token_ids": [tokens[4]], "min_tokens": least})
        for least in (0, 20)
    ]
    return [(_tokens(answer), answer.choices[0].finish_reason) for answer in answers]


def _stop_string_kept(client: OpenAI, model: str) -> Any:
    """The first of several strings, which stays in the answer, across the end of a token."""
    whole = _complete(client, model, max_tokens=40).choices[0].text
    stops = [whole[start : start + 5] for start in (len(whole) // 2, len(whole) // 3)]
    extra = {"include_stop_str_in_output": True}
    choice = _complete(client, model, max_tokens=40, stop=stops, extra_body=extra).choices[0]
    return choice.text, choice.finish_reason, choice.stop_reason


def _logit_bias(client: OpenAI, model: str) -> Any:
    """One token is excluded, one is made likely for as long as it may follow."""
    (tokens,) = _tokens(_complete(client, model))
    bias = {str(tokens[0]): -100, str(tokens[1]): 3}
    return _tokens(_complete(client, model, logit_bias=bias))


def _allowed_and_bad(client: OpenAI, model: str) -> Any:
    few = _tokens(_complete(client, model, extra_body={"allowed_token_ids": list(range(300, 340))}))
    word = _complete(client, model, max_tokens=1).choices[0].text.strip()
    return few, _tokens(_complete(client, model, extra_body={"bad_words": [word or "a"]}))


def _beam_search(client: OpenAI, model: str) -> Any:
    answer = client.completions.create(
        model=model, prompt=PROMPTS[3], max_tokens=8, n=3, temperature=0, extra_body={"use_beam_search": True}
    )
    return [choice.text for choice in answer.choices]


def _echo(client: OpenAI, model: str) -> Any:
    choice = _complete(client, model, echo=True, logprobs=2, max_tokens=8).choices[0]
    return choice.text, [value and round(value, 3) for value in choice.logprobs.token_logprobs]


def _several_prompts(client: OpenAI, model: str) -> Any:
    return _tokens(_complete(client, model, list(PROMPTS[:5])))  # type: ignore[arg-type]


def _several_streamed(client: OpenAI, model: str) -> Any:
    """The pieces of three answers come in any order."""
    stream = client.completions.create(
        model=model, prompt=PROMPTS[5], max_tokens=16, n=3, seed=5, temperature=0.9, stream=True
    )
    texts = ["", "", ""]
    for piece in stream:
        for choice in piece.choices:
            texts[choice.index] += choice.text
    return texts


def _narrow_sampling(client: OpenAI, model: str) -> Any:
    extra = {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.2}
    return _tokens(_complete(client, model, seed=11, temperature=0.8, extra_body=extra))


def _chat_log_probabilities(client: OpenAI, model: str) -> Any:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Left or right?"}]
    reply = client.chat.completions.create(
        model=model, messages=messages, max_tokens=8, temperature=0, logprobs=True, top_logprobs=4
    )
    assert reply.choices[0].logprobs is not None
    return [
        (each.token, round(each.logprob, 3), [other.token for other in each.top_logprobs])
        for each in reply.choices[0].logprobs.content or ()
    ]


def _json_schema_streamed(client: OpenAI, model: str) -> Any:
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Who?"}],
        max_tokens=60,
        temperature=0,
        stream=True,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
    )
    return "".join(piece.choices[0].delta.content or "" for piece in stream)


def _aborted_stream(client: OpenAI, model: str) -> Any:
    """A client that leaves in the middle of its answer, then one that asks the same."""
    stream = client.completions.create(model=model, prompt=PROMPTS[7], max_tokens=400, temperature=0, stream=True)
    pieces = iter(stream)
    start = [next(pieces).choices[0].text for _ in range(3)]
    stream.close()
    return start, _tokens(_complete(client, model, PROMPTS[7]))


def _truncated_prompt(client: OpenAI, model: str) -> Any:
    answer = _complete(client, model, PROMPTS[12], extra_body={"truncate_prompt_tokens": 9})
    assert answer.usage.prompt_tokens == 9
    return _tokens(answer)


def _anthropic(client: OpenAI, model: str) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": "Which desk?"}], "max_tokens": 24}
    answer: Any = client.post("/messages", cast_to=object, body=body | {"temperature": 0})
    return answer["content"], answer["stop_reason"], answer["usage"]["output_tokens"]


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
    mistakes: tuple[dict[str, Any], ...] = (
        {"max_tokens": 100_000},
        {"temperature": -1.0},
        {"extra_body": {"structured_outputs": {"regex": "["}}},
        {"n": 0},
        {"logit_bias": {"1000000": 1}},
        {"logprobs": 1000},
        {"extra_body": {"allowed_token_ids": []}},
        {"extra_body": {"min_tokens": 30}},
        {"extra_body": {"stop_token_ids": ["a"]}},
        {"prompt": [[10**9]]},
        {"prompt": []},
    )
    for options in mistakes:
        try:
            _complete(client, model, **options)
            codes.append(200)
        except APIStatusError as error:
            codes.append(error.status_code)
    return codes


DRAWN = ("n=2", "n=3, streamed", "seeds", "top_k, min_p, repetition penalty")
"""Questions whose answers are drawn."""

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
    "stop string that is kept": _stop_string_kept,
    "stop token, min_tokens": _stop_token,
    "logit_bias": _logit_bias,
    "allowed tokens, bad words": _allowed_and_bad,
    "beam search": _beam_search,
    "echo": _echo,
    "five prompts in a request": _several_prompts,
    "n=3, streamed": _several_streamed,
    "top_k, min_p, repetition penalty": _narrow_sampling,
    "chat, log probabilities": _chat_log_probabilities,
    "stream that its client leaves": _aborted_stream,
    "truncated prompt": _truncated_prompt,
    "/v1/messages": _anthropic,
    "JSON schema, streamed": _json_schema_streamed,
    "JSON schema": _json_schema,
    "regular expression": _regular_expression,
    "penalties": _penalties,
    "chunked prefill of 900 tokens": _long_prompt,
    "prefix cache": _same_prefix,
    "bad requests": _errors,
}
