"""vLLM's other commands: `bench serve` against a server, `run-batch`, and a server that a file configures."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.serve import prompts
from tests.serve.hosts import Hosts
from tests.serve.servers import Server
from vllm_spark.processes.local import CPU_ENVIRONMENT
from vllm_spark.processes.managed import program

from .report import EQUAL, record
from .side_by_side import SideBySide

pytestmark = pytest.mark.thorough

COMMAND_SECONDS = 400.0
NAMES = ["desk", "tiny"]
SAMPLING = {"temperature": 0.0, "max_new_tokens": 9}
OPTIONS = {
    "dtype": "float32",
    "enforce-eager": True,
    "max-model-len": 1024,
    "max-num-seqs": 16,
    "served-model-name": NAMES,
    "override-generation-config": SAMPLING,
    "structured-outputs-config": {"backend": "xgrammar"},
}


@contextmanager
def follower(hosts: Hosts) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """`vllm-spark join` on the second host; yields the settings and the environment of a leader for it."""
    first, second = hosts
    environment = CPU_ENVIRONMENT | {"VLLMSPARK_SECRET": secrets.token_hex(16)}
    settings = {"address": first.address, "port": first.free_port(), "transport": "loopback"}
    join = [program("vllm-spark"), "join", "--leader", first.address, "--port", str(settings["port"])]
    process = second.popen(join, environment, "vllm-spark join")
    try:
        yield settings, environment
    finally:
        process.terminate()


@contextmanager
def configured(hosts: Hosts, model: Path, file: Path, options: dict[str, Any], environment: Any) -> Iterator[Server]:
    """`vllm serve MODEL --config FILE` and nothing else."""
    first = hosts[0]
    address = {"host": first.address, "port": first.free_port()}
    file.write_text(yaml.safe_dump(OPTIONS | address | options))
    leader = first.popen([program("vllm"), "serve", str(model), "--config", str(file)], environment, "vllm serve")
    try:
        server = Server(f"http://{address['host']}:{address['port']}", leader)
        server.wait_until_healthy()
        yield server
    finally:
        leader.terminate()


@pytest.fixture(scope="module")
def both(hosts: Hosts, tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SideBySide]:
    """Stock vLLM with both ranks on the first host, and the pair, whose settings are nested in its file."""
    folder, first = tmp_path_factory.mktemp("configured"), hosts[0]
    two_ranks = {"tensor-parallel-size": 2, "distributed-executor-backend": "mp"}
    network = {"VLLM_HOST_IP": first.address, "GLOO_SOCKET_IFNAME": first.interface}
    with ExitStack() as stack:
        stock = configured(hosts, tiny_dense, folder / "stock.yaml", two_ranks, CPU_ENVIRONMENT | network)
        settings, environment = stack.enter_context(follower(hosts))
        spark = {"additional-config": {"spark": settings}}
        pair = configured(hosts, tiny_dense, folder / "pair.yaml", spark, environment)
        yield SideBySide(stack.enter_context(stock), stack.enter_context(pair))


def test_a_file_with_nested_settings(both: SideBySide) -> None:
    """The sampling of requests that say nothing of it, and on the pair its own settings."""

    def ask(server: Server) -> list[list[int]]:
        answers = [
            server.client.completions.create(
                model=NAMES[0], prompt=prompt, extra_body={"return_token_ids": True, "ignore_eos": True}
            )
            for prompt in prompts.PROMPTS[:4]
        ]
        return [(answer.choices[0].model_extra or {})["token_ids"] for answer in answers]

    with both.same(
        "--config", "nested options, and the pair's settings", ask, lambda found: f"{len(found)} answers"
    ) as tokens:
        assert [len(each) for each in tokens] == [SAMPLING["max_new_tokens"]] * 4


def test_several_names(both: SideBySide) -> None:
    def ask(server: Server) -> list[Any]:
        create = server.client.completions.create
        texts = [create(model=name, prompt="def main(", max_tokens=16, temperature=0).choices[0].text for name in NAMES]
        labels = [server.labelled("vllm:request_success_total", model_name=name) > 0 for name in NAMES]
        return [[model.id for model in server.client.models.list().data], texts, labels]

    with both.same("several served names", " and ".join(NAMES), ask, lambda answer: "2 answers each") as (
        models,
        texts,
        labels,
    ):
        assert models == NAMES
        assert texts[0] == texts[1] != ""
        assert labels == [True, False]  # metrics have the first name


def test_bench_serve(both: SideBySide, hosts: Hosts, tiny_dense: Path, tmp_path: Path) -> None:
    def ask(server: Server) -> list[Any]:
        result = tmp_path / f"{server.url.rpartition(':')[2]}.json"
        argv = [
            *(program("vllm"), "bench", "serve", "--base-url", server.url, "--backend", "openai"),
            *("--model", NAMES[0], "--tokenizer", str(tiny_dense), "--temperature", "0", "--ignore-eos"),
            *("--dataset-name", "random", "--random-input-len", "24", "--random-output-len", "12"),
            *("--num-prompts", "8", "--seed", "5"),
            *("--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", result.name),
        ]
        process = hosts[0].popen(argv, CPU_ENVIRONMENT, "vllm bench serve")
        assert process.wait(COMMAND_SECONDS) == 0, process.tail()
        found = json.loads(result.read_text())
        return [found[name] for name in ("completed", "total_input_tokens", "total_output_tokens", "generated_texts")]

    with both.same(
        "vllm bench serve", "8 random prompts", ask, lambda answer: f"{answer[0]} requests, {answer[2]} tokens"
    ) as (completed, _, tokens, texts):
        assert (completed, tokens) == (8, 96)
        assert len(set(texts)) > 4


def batch(hosts: Hosts, model: Path, folder: Path, more: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The answers of `vllm run-batch` by the ids of the requests."""
    asked, answered = folder / "asked.jsonl", folder / "answered.jsonl"
    lines = []
    for number, prompt in enumerate(prompts.PROMPTS[:5]):
        body = {
            "model": str(model),
            "messages": [{"role": "user", "content": prompt}],
            **{"max_tokens": 16, "temperature": 0},
        }
        request = {"custom_id": f"number {number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(request) + "\n")
    asked.write_text("".join(lines))
    common = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    argv = [program("vllm"), "run-batch", "-i", str(asked), "-o", str(answered), "--model", str(model), *common, *more]
    process = hosts[0].popen(argv, CPU_ENVIRONMENT | environment, "vllm run-batch")
    assert process.wait(COMMAND_SECONDS) == 0, process.tail()
    answers = [json.loads(line) for line in answered.read_text().splitlines()]
    return {each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"] for each in answers}


def test_run_batch(hosts: Hosts, tiny_dense: Path, tmp_path: Path) -> None:
    """It starts an engine of its own."""
    first = hosts[0]
    network = {"VLLM_HOST_IP": first.address, "GLOO_SOCKET_IFNAME": first.interface}
    two_ranks = ["--tensor-parallel-size", "2", "--distributed-executor-backend", "mp"]
    expected = batch(hosts, tiny_dense, tmp_path, two_ranks, network)
    with follower(hosts) as (settings, environment):
        flags = [word for name, value in settings.items() for word in (f"--spark-{name}", str(value))]
        assert batch(hosts, tiny_dense, tmp_path, ["--spark", *flags], environment) == expected
    assert len(set(expected.values())) == 5
    record("vllm run-batch", "5 chats", f"{EQUAL}: {len(expected)} answers")
