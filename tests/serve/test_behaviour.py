"""What stock vLLM answers on two ranks, the pair answers too."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import APIError

from . import prompts
from .development import DEVELOPMENT, EXTENSION, call, post
from .features.report import record
from .hosts import Hosts
from .questions import QUESTIONS, ask_all
from .servers import Server, spark_tp2, stock_tp2

# Small batches of tokens: a prompt of 900 is prefilled in four chunks.
ARGUMENTS = ("--max-num-batched-tokens", "256", "--enable-chunked-prefill", "--enable-prefix-caching")
MIXED_REQUESTS = 200
# What the two ranks are started with: a variable that vLLM reads while it is imported, one that only the follower has.
LEADERS = {"VLLM_USE_LAYERNAME": "0"}
FOLLOWERS = {"VLLM_USE_LAYERNAME": "1", "VLLM_LOG_BATCHSIZE_INTERVAL": "9", "NCCL_ALGO": "Ring"}
COUNTING = "1, 2, 3, 1, 2, 3, 1, 2, 3, "


def mixed_requests(server: Server) -> list[list[int]]:
    """200 greedy requests of mixed length, sent at random times within some seconds.

    Greedy, because vLLM's CPU worker cannot chunk the prefill of a seeded request (torch: "CPU Generator does not use
    offset").
    """
    chance = random.Random(3)
    model = server.client.models.list().data[0].id
    plans = [
        {
            "prompt": [chance.randrange(5, 1900) for _ in range(chance.choice((1, 5, 40, 200)))],
            "max_tokens": chance.choice((1, 3, 8, 16)),
            "delay": chance.uniform(0, 6),
        }
        for _ in range(MIXED_REQUESTS)
    ]
    start = time.monotonic()

    def ask(plan: dict[str, Any]) -> list[int]:
        time.sleep(max(0.0, start + plan["delay"] - time.monotonic()))
        options = {name: value for name, value in plan.items() if name != "delay"}
        answer = server.client.completions.create(
            model=model, temperature=0, extra_body={"return_token_ids": True, "ignore_eos": True}, **options
        )
        tokens: list[int] = (answer.choices[0].model_extra or {})["token_ids"]
        return tokens

    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(ask, sorted(plans, key=lambda plan: plan["delay"])))


@pytest.fixture(scope="module")
def expected(hosts: Hosts, tiny_moe: Path) -> dict[str, Any]:
    """Stock vLLM's answers on the same two hosts."""
    with stock_tp2(hosts, tiny_moe, ARGUMENTS) as server:
        return {**ask_all(server.client), "mixed": mixed_requests(server)}


@pytest.fixture(scope="module")
def pair(hosts: Hosts, tiny_moe: Path, expected: dict[str, Any]) -> Iterator[Server]:
    """The pair, with vLLM's development endpoints and an extension that can plant a drift."""
    with spark_tp2(hosts, tiny_moe, [*ARGUMENTS, *EXTENSION], DEVELOPMENT) as server:
        yield server


@pytest.fixture(scope="module")
def answers(pair: Server) -> dict[str, Any]:
    return ask_all(pair.client)


@pytest.mark.parametrize("question", list(QUESTIONS))
def test_same_answer_as_stock_vllm(question: str, answers: dict[str, Any], expected: dict[str, Any]) -> None:
    assert answers[question] == expected[question]
    record("requests", question)


def test_answers_mean_something(answers: dict[str, Any]) -> None:
    assert len(answers["n=2"]) == 2
    assert answers["n=2"][0] != answers["n=2"][1]
    assert answers["seeds"][0] == answers["seeds"][2] != answers["seeds"][1]
    assert answers["stop string"][1] == "stop"
    assert answers["bad requests"] == [400, 400, 400]
    assert re.fullmatch(r"[a-f]{4}-\d{3}", answers["regular expression"])
    assert_beginning_of_a_person(answers["JSON schema"][1])
    assert answers["/v1/responses"][0]
    assert answers["/v1/responses, streamed"][0]


def test_mixed_requests(pair: Server, expected: dict[str, Any]) -> None:
    assert mixed_requests(pair) == expected["mixed"]
    assert_nothing_left(pair)


def test_the_cache_of_prefixes_is_used(pair: Server, answers: dict[str, Any]) -> None:
    """Otherwise the same answers to the same prefix say nothing about it."""
    hits = "vllm:prefix_cache_hits_total"
    assert pair.metrics(hits)[hits][""] > 0


def test_the_log_names_the_path_of_the_collectives_alone(pair: Server) -> None:
    """vLLM's line that a group falls back to torch.distributed is not true of a pair."""
    log = pair.leader.output()
    assert "Group tp:0: collectives use vllm_spark" in log
    assert "The tensor parallel size is 2, one rank on each machine" in log
    assert "falling back to torch.distributed" not in log


def test_a_collective_that_the_runtime_does_not_take(pair: Server) -> None:
    """It goes through gloo, gives the right sum, and is counted on both ranks and shown."""
    name = "vllm_spark_fallbacks_total"
    shown = pair.metrics()[name]
    results = call(pair, "sum_of_integers")
    assert [result["sum"] for result in results] == [[3, (2 << 40) + 1]] * 2
    assert [after - before for before, after in (result["fallbacks"] for result in results)] == [1, 1]
    expected = {rank: value + 1 for rank, value in shown.items()}
    pair.leader.wait_until(lambda: pair.metrics()[name] == expected, 20.0, f"shown {expected}")


def test_every_collective_that_is_left_to_vllm_is_counted(pair: Server) -> None:
    for counted in call(pair, "collectives_left_to_vllm"):
        assert len(counted) == 6
        assert set(counted.values()) == {1}, counted


def test_a_client_that_leaves_in_the_middle(pair: Server) -> None:
    completed = completed_requests(pair)
    model = pair.client.models.list().data[0].id
    for _ in range(3):
        stream = pair.client.completions.create(
            model=model, prompt="never ends", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    assert_nothing_left(pair)
    assert completed_requests(pair) == completed, "they were cut off, and not computed to their end"
    assert pair.client.completions.create(model=model, prompt="after", max_tokens=4).choices[0].text


def test_ranks_stay_in_step_when_sampling_without_a_seed(pair: Server) -> None:
    model = pair.client.models.list().data[0].id

    def ask(number: int) -> str:
        answer = pair.client.completions.create(
            model=model, prompt=f"dice {number}", max_tokens=32, temperature=1.2, extra_body={"ignore_eos": True}
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(16)))
    assert len(set(texts)) == len(texts), "random answers differ"
    assert_nothing_left(pair)


def test_a_call_that_times_out_leaves_the_pair_at_work(pair: Server) -> None:
    """As in vLLM, whoever called is told, and everything goes on."""
    before = prompts.greedy_tokens(pair.client, prompts.PROMPTS[:2])
    assert post(pair, "/collective_rpc", {"method": "sleep_on", "args": [1, 3.0], "timeout": 0.2}) >= 400
    assert "the call of sleep_on timed out after 0.2 s: the follower on" in pair.leader.output()
    assert call(pair, "sleep_on", 1, 0.0) == [{"rank": 0}, {"rank": 1}], "and not the answer to the call before it"
    assert prompts.greedy_tokens(pair.client, prompts.PROMPTS[:2]) == before
    # An answer that nobody waits for any more, and that is larger than what a connection holds by itself.
    large = {"method": "sleep_on", "args": [1, 1.0, 32 << 20], "timeout": 0.2}
    assert post(pair, "/collective_rpc", large) >= 400
    assert prompts.greedy_tokens(pair.client, prompts.PROMPTS[:2]) == before


def test_sleep_and_wake_up(pair: Server) -> None:
    """vLLM's CPU worker ignores sleep, and says so on each rank; the calls reach both and change nothing."""
    before = prompts.greedy_tokens(pair.client, prompts.PROMPTS[:2])
    for path in ("/sleep?level=1", "/wake_up"):
        assert post(pair, path) == 200
    assert prompts.greedy_tokens(pair.client, prompts.PROMPTS[:2]) == before


def test_planted_drift_ends_in_an_error(pair: Server) -> None:
    """One draw too many on one rank: found within one step of the one that it changed. The end of this pair."""
    assert_drift_is_found(pair, 1)


@pytest.mark.thorough
def test_drift_of_the_leader_ends_in_an_error(hosts: Hosts, tiny_moe: Path) -> None:
    with spark_tp2(hosts, tiny_moe, EXTENSION, DEVELOPMENT) as server:
        assert_drift_is_found(server, 0)


@pytest.mark.thorough
def test_ngram_speculation(hosts: Hosts, tiny_moe: Path, reference_tokens: list[list[int]]) -> None:
    speculation = json.dumps({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4})
    arguments = ["--speculative-config", speculation, *EXTENSION]
    with spark_tp2(hosts, tiny_moe, arguments, DEVELOPMENT | LEADERS, join_env=FOLLOWERS) as server:
        assert_equal_environments(server)
        assert prompts.greedy_tokens(server.client, prompts.PROMPTS[:6], max_tokens=32) == [
            tokens[:32] for tokens in reference_tokens[:6]
        ]
        assert server.metrics("vllm:spec_decode_num_draft_tokens")["vllm:spec_decode_num_draft_tokens_total"][""] > 0
        # Cold enough for tokens to repeat, so that there are drafts to verify, which both ranks must do alike.
        for temperature in (0.02, 0.04, 0.08, 0.16, 1.0):
            server.client.completions.create(
                model=server.client.models.list().data[0].id,
                prompt=[COUNTING] * 4,
                max_tokens=64,
                temperature=temperature,
                top_p=0.9,
                extra_body={"ignore_eos": True},
            )
        assert_nothing_left(server)


def assert_drift_is_found(server: Server, rank: int) -> None:
    """Has `rank` draw once too often in the middle of an answer, and reads how that ends."""
    model = server.client.models.list().data[0].id
    stream = server.client.completions.create(
        model=model, prompt="dice", max_tokens=900, temperature=1.0, stream=True, extra_body={"ignore_eos": True}
    )
    iterator = iter(stream)
    for _ in range(3):
        next(iterator)
    drawn = call(server, "draw_once_on", rank)[0]["step"]
    with pytest.raises(APIError):
        for _ in iterator:
            pass
    message = server.leader.wait_for_line(r"sampled different tokens at step (\d+)", 10)
    assert drawn >= 3
    assert int(message[1]) == drawn + 1
    assert server.leader.wait(30) != 0


def assert_equal_environments(server: Server) -> None:
    """The follower has the leader's, from its process's start on, and says what was different."""
    leaders, followers = call(server, "environment", *FOLLOWERS)
    assert leaders["variables"] | {"NCCL_ALGO": "Ring"} == followers["variables"]
    assert leaders["layer names"] is followers["layer names"] is False
    assert leaders["numba"] == followers["numba"] == 1
    assert server.follower is not None
    log = server.follower.output()
    for sentence in (
        "VLLM_USE_LAYERNAME is '1' here and '0' on the leader; the leader's value applies.",
        "VLLM_LOG_BATCHSIZE_INTERVAL is '9' here and not set on the leader; the leader's value applies.",
        "NCCL_ALGO is 'Ring' here and not set on the leader; set it to the same value on both machines.",
    ):
        assert sentence in log
    assert log.count("The next process starts with the leader's environment.") == 1
    assert re.search("INFO .*The follower on .* starts again, with this leader's environment", server.leader.output())
    assert "does not fit" not in server.leader.output()


def assert_nothing_left(server: Server) -> None:
    """No request runs or waits, and both ranks have sampled the same tokens in every step."""

    def idle() -> bool:
        values = server.metrics("")
        waiting = values["vllm:num_requests_running"][""] + values["vllm:num_requests_waiting"][""]
        steps, digests = values["vllm_spark_steps_total"], values["vllm_spark_token_digest"]
        return waiting == 0 and steps["0"] == steps["1"] > 0 and digests["0"] == digests["1"]

    server.leader.wait_until(idle, 20.0, "ended every request with both ranks in step")


def completed_requests(server: Server) -> float:
    """How many requests were answered to their end. (Those whose client left vLLM 0.32 counts nowhere.)"""
    return sum(server.labelled("vllm:request_success_total", finished_reason=why) for why in ("length", "stop"))


def assert_beginning_of_a_person(text: str) -> None:
    """Checks that `text` is an object of the questions' schema, or its beginning."""
    try:
        person = json.loads(text)
    except json.JSONDecodeError:  # cut off by the limit of tokens
        space, string = r"\s*", r'"(?:[^"\\]|\\.?)*"?'
        assert re.fullmatch(rf'{space}(\{{{space}("name"?{space}:?{space}({string})?.*)?)?', text, re.DOTALL), text
        return
    assert person.keys() == {"name", "age"}
    assert len(person["name"]) <= 8
    assert isinstance(person["age"], int)
    assert person["age"] <= 99
