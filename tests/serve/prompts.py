"""Prompts of many shapes, and greedy answers as token ids: what two servers must agree on to the last id."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI

PROMPTS: tuple[str, ...] = (
    "a",
    "def main(",
    "The cable between the two desks carries",
    "import os\nimport sys\n\n\ndef walk(",
    "class Process:\n    def __init__(self, name, argv):\n        ",
    "1, 1, 2, 3, 5, 8, 13, 21, ",
    "Es war einmal ein Rechner, der war zu klein für sein Modell.",
    "二つの机、一つのモデル。",
    "Le câble mesure 0,5 m — pas plus.",
    "🚀 emoji, tabs\tand\nnew\r\nlines",
    "SELECT name, count(*) FROM tokens GROUP BY",
    "if x == 0: return None\nelif x < 0: raise ValueError(",
    "the " * 64,
    " ".join(str(number * number) for number in range(60)),
    '{"role": "user", "content": "Answer in one word:',
    "for layer in range(48):\n    hidden = norm(hidden + all_reduce(attention(hidden)))\n" * 4,
    "-----BEGIN-----" + "=" * 80,
    "    " * 20 + "return",
)


def greedy_tokens(
    client: OpenAI, prompts: Sequence[str] = PROMPTS, max_tokens: int = 64, concurrency: int = 8
) -> list[list[int]]:
    """The token ids of the greedy answer to each prompt, in the order of the prompts.

    Args:
        client: of a server with one model.
        prompts: sent as completions, without a chat template.
        max_tokens: length of every answer; the end-of-turn token does not end it.
        concurrency: requests in flight at once.
    """
    model = client.models.list().data[0].id

    def answer(prompt: str) -> list[int]:
        completion = client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        tokens: list[int] = (completion.choices[0].model_extra or {})["token_ids"]
        assert len(tokens) == max_tokens, f"{len(tokens)} tokens came back for {prompt!r}, not {max_tokens}"
        return tokens

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(answer, prompts))
