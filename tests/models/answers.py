"""What is asked of a server of any architecture, and its answers, which two servers can be compared by to the last bit.

Everything is asked one by one: a step with one sequence does the same sums on every server, whereas requests that come
together are put into steps by their times of arrival.
"""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.serve.servers import Server
from vllm_spark.models.tiny import VOCABULARY

Lengths = Sequence[int]
PROMPT_LENGTHS = (1, 5, 33, 130)
ANSWER_TOKENS = 24
COLOURS = ("red", "white", "navy")
TEXTS = (
    "a",
    "def main(argv):",
    "The cable between the two desks carries every sum of the two machines.",
    " ".join(str(number * number) for number in range(40)),
)


@dataclass(frozen=True)
class Answers:
    """Answers of one server.

    Attributes:
        values: what must be equal: token ids and logarithms of probabilities, or the numbers of a pooling model.
        counted: what these are, for the report.
    """

    values: list[Any]
    counted: str

    @property
    def tokens(self) -> list[list[int]]:
        """The token ids alone, of a model that generates."""
        return [tokens for tokens, _ in self.values]


def prompts(lengths: Lengths) -> list[list[int]]:
    """Prompts of so many token ids, none of them a special one."""
    return [[(13 * place + 7 * length) % (VOCABULARY - 64) + 3 for place in range(length)] for length in lengths]


def generated(server: Server, lengths: Lengths) -> Answers:
    """Greedy answers to `prompts`, one after the other."""
    values = [_completion(server, prompt) for prompt in prompts(lengths)]
    assert len({token for tokens, _ in values for token in tokens}) > len(values), "the answers are not constant"
    return Answers(values, f"{sum(len(tokens) for tokens, _ in values)} tokens and their probabilities")


def generated_together(server: Server, lengths: Lengths) -> list[list[int]]:
    """The token ids of greedy answers to `prompts` in one request: the steps have up to four sequences."""
    completion = server.client.completions.create(
        model=_model(server),
        prompt=prompts(lengths),
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    return [list((choice.model_extra or {})["token_ids"]) for choice in completion.choices]


def about_pictures(server: Server, lengths: Lengths) -> Answers:
    """Greedy answers to `prompts`, and to questions about pictures of one colour each."""
    text = generated(server, lengths)
    pictures = [_chat_about(server, colour) for colour in COLOURS]
    assert len({json.dumps(answer) for answer in pictures}) == len(COLOURS), "each picture has its own probabilities"
    values = text.values + pictures
    counted = f"{sum(len(tokens) for tokens, _ in values)} tokens and their probabilities, {len(COLOURS)} pictures"
    return Answers(values, counted)


def embeddings(server: Server, lengths: Lengths) -> Answers:
    """Embeddings of `TEXTS`."""
    model = _model(server)
    values = [
        server.client.embeddings.create(model=model, input=text, encoding_format="float").data[0].embedding
        for text in TEXTS
    ]
    assert len({tuple(value) for value in values}) == len(TEXTS), "the text decides the embedding"
    return Answers(values, f"{len(values)} embeddings of {len(values[0])} numbers")


def scores(server: Server, lengths: Lengths) -> Answers:
    """What `/score` gives to pairs of `TEXTS`, and the order and scores of `/rerank`."""
    first, *others = TEXTS
    pairs = [_post(server, "/score", {"text_1": first, "text_2": other})["data"][0]["score"] for other in others]
    results = _post(server, "/rerank", {"query": first, "documents": others[:1]})["results"]
    ranked = [(result["index"], result["relevance_score"]) for result in results]
    assert len(set(pairs)) == len(pairs), "the text decides the score"
    return Answers([pairs, ranked], f"{len(pairs)} scores and a ranking")


def rewards(server: Server, lengths: Lengths) -> Answers:
    """What `/pooling` gives to `TEXTS`: a number for each token."""
    values = [_post(server, "/pooling", {"input": text, "task": "token_classify"})["data"][0]["data"] for text in TEXTS]
    assert len({json.dumps(value[-1]) for value in values}) == len(TEXTS), "the text decides the reward"
    return Answers(values, f"{sum(len(value) for value in values)} rewards")


def _completion(server: Server, prompt: Sequence[int]) -> tuple[list[int], list[float]]:
    completion = server.client.completions.create(
        model=_model(server),
        prompt=list(prompt),
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        logprobs=1,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    (choice,) = completion.choices
    assert choice.logprobs is not None
    tokens = list((choice.model_extra or {})["token_ids"])
    assert len(tokens) == ANSWER_TOKENS
    return tokens, [float(value) for value in choice.logprobs.token_logprobs or () if value is not None]


def _chat_about(server: Server, colour: str) -> tuple[list[int], list[float]]:
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture_of(colour)}"}}
    chat = server.client.chat.completions.create(
        model=_model(server),
        messages=[{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}],  # type: ignore[list-item, misc]
        temperature=0,
        max_tokens=ANSWER_TOKENS,
        logprobs=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    (choice,) = chat.choices
    assert choice.logprobs is not None
    tokens = list((choice.model_extra or {})["token_ids"])
    return tokens, [entry.logprob for entry in choice.logprobs.content or ()]


def picture_of(colour: str) -> str:
    """A PNG of 42 x 42 pixels, in base64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (42, 42), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _model(server: Server) -> str:
    return server.client.models.list().data[0].id


def _post(server: Server, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        server.url + path,
        json.dumps({"model": _model(server)} | body).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as response:
        return json.load(response)
