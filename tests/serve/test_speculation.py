"""Speculation with a temperature: both ranks verify drafts with the same numbers, and sample the same tokens."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .hosts import Hosts
from .servers import Server, spark_tp2
from .test_tokens import settled

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
PROMPT = "1, 2, 3, 1, 2, 3, 1, 2, 3, "


def answer(server: Server, temperature: float, **more: float | int) -> int:
    """How many tokens came of 96."""
    completion = server.client.completions.create(
        model=server.client.models.list().data[0].id,
        prompt=PROMPT,
        max_tokens=96,
        temperature=temperature,
        extra_body={"ignore_eos": True, "return_token_ids": True, **more},
    )
    return len((completion.choices[0].model_extra or {})["token_ids"])


def test_both_ranks_sample_the_same_tokens(hosts: Hosts, tiny_dense: Path) -> None:
    # Cold enough for some tokens to repeat, so that there are drafts to verify.
    requests = [{"temperature": 0.02 * number} for number in range(1, 9)]
    requests += [{"temperature": 0.9, "top_p": 0.3}, {"temperature": 0.0}, {"temperature": 1.0, "seed": 7}]
    with spark_tp2(hosts, tiny_dense, ["--speculative-config", json.dumps(NGRAM)]) as server:
        with ThreadPoolExecutor(4) as pool:
            counts = pool.map(lambda request: answer(server, **request), requests)
            assert list(counts) == [96] * len(requests)
        counters = settled(server)
        assert server.metrics("vllm:spec_decode_num_accepted_tokens_total"), "drafts were verified"
        digests = counters["vllm_spark_token_digest"]
        assert digests["0"] == digests["1"] != 0
