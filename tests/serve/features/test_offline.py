"""`LLM` in a program: chat, then a second engine in the same process that embeds and scores."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serve.hosts import Host, Hosts
from tests.serve.process import Process, assert_all_gone
from vllm_spark.processes.local import CPU_ENVIRONMENT
from vllm_spark.processes.managed import program

from .report import EQUAL, record

pytestmark = pytest.mark.thorough

ANSWER_SECONDS = 400.0
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

def chat(llm):
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
    talks = [[{"role": "user", "content": text}] for text in ("Which desk?", "Name the wire between the two desks.")]
    return [
        [list(answer.token_ids), [row[token].logprob for token, row in zip(answer.token_ids, answer.logprobs)]]
        for output in llm.chat(talks, greedy, use_tqdm=False)
        for answer in output.outputs
    ]

def embed(llm):
    return [output.outputs.embedding for output in llm.embed(["a desk", "a wire"], use_tqdm=False)]

def score(llm):
    return [output.outputs.score for output in llm.score("a desk", ["a wire", "the left desk"], use_tqdm=False)]

if __name__ == "__main__":
    model, options = json.loads(sys.argv[1])
    common = dict(dtype="float32", enforce_eager=True, max_model_len=1024, **options)
    first = LLM(model, **common)
    print("\\nchat:", json.dumps(chat(first)), flush=True)
    first.llm_engine.engine_core.shutdown()
    second = LLM(model, runner="pooling", convert="embed", **common)
    print("\\nembed:", json.dumps(embed(second)), flush=True)
    print("\\nscore:", json.dumps(score(second)), flush=True)
    second.llm_engine.engine_core.shutdown()
"""


def run(
    host: Host, model: Path, options: dict[str, Any], environment: dict[str, str]
) -> tuple[Process, dict[str, Any]]:
    """The program's process, and what it has printed."""
    argv = [sys.executable, "-u", "-c", PROGRAM, json.dumps([str(model), options])]
    process = host.popen(argv, CPU_ENVIRONMENT | environment, "offline")
    assert process.wait(ANSWER_SECONDS) == 0, process.tail()
    lines = [line.partition(": ") for line in process.output().splitlines()]
    return process, {name: json.loads(value) for name, _, value in lines if name in ("chat", "embed", "score")}


def test_two_engines_one_after_the_other(hosts: Hosts, tiny_dense: Path) -> None:
    first, second = hosts
    own = {"VLLM_HOST_IP": first.address, "GLOO_SOCKET_IFNAME": first.interface}
    _, expected = run(first, tiny_dense, {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, own)
    secret = {"VLLMSPARK_SECRET": secrets.token_hex(16)}
    port = first.free_port()
    join = [program("vllm-spark"), "join", "--leader", first.address, "--port", str(port)]
    follower = second.popen(join, CPU_ENVIRONMENT | secret, "vllm-spark join")
    settings = {"address": first.address, "port": port, "transport": "loopback"}
    leader, answers = run(first, tiny_dense, {"additional_config": {"spark": settings}}, secret)
    assert follower.output().count("Ready: this machine runs every step together with its leader.") == 2
    follower.terminate()
    assert_all_gone(leader, follower)
    assert len(expected) == 3
    assert answers == expected
    counted = {
        "chat": f"{sum(len(tokens) for tokens, _ in expected['chat'])} tokens and their probabilities",
        "embed": f"{len(expected['embed'])} embeddings of {len(expected['embed'][0])} numbers, by a second engine",
        "score": f"{len(expected['score'])} scores, by the second engine",
    }
    for name, what in counted.items():
        record("offline LLM", name, f"{EQUAL}: {what}")
