"""Serves one model with and without speculative decoding, by this project's pair and by vLLM's own, in one run.

    python -m benchmarks.served_speculation --json FILE

Every candidate is a real server (`vllm serve`), asked over HTTP. For each method: time of a decode step, tokens that
were drafted and accepted, collectives of one step, and whether the greedy tokens are those without speculation. Weights
and the EAGLE3 head are random (`--load-format dummy`), so a head's guesses are hardly ever accepted: a step costs what
it costs with a trained one, and its tokens must be the same.

Needs two GPUs (vLLM's own pair over host memory with NCCL, as between two machines). With `--one-gpu`, both ranks of
this project's pair share one, beside one rank of stock vLLM; with `--device cpu` no GPU is needed. Both test the
function, not the speed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openai import DefaultHttpxClient, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from vllm_spark.config.settings import SECRET_VARIABLE
from vllm_spark.errors import SparkError
from vllm_spark.files import configs_folder
from vllm_spark.models.tiny import make_tiny_model
from vllm_spark.processes.child import python_module
from vllm_spark.processes.group import ProcessGroup, process_group
from vllm_spark.processes.local import CPU_ENVIRONMENT, LOOPBACK, free_ports
from vllm_spark.processes.managed import Process, answers, clean_environment

START_SECONDS = 300.0
MODELS = {"cuda": "qwen3-30b-a3b-int4", "cpu": "tiny-moe"}
METHODS = ("none", "eagle3:1", "eagle3:3")
SERVERS = ("spark", "spark-wire", "stock", "one-rank")
"""This project's pair, direct and over the modelled wire; vLLM's own pair; one rank of stock vLLM."""
ONE_GPU_SHARE = "0.42"
PROMPTS = 4
SHOWN_EVERY = 1.0
"""Seconds in which a rank shows its counters at least once."""
REST_SECONDS = 30.0


@dataclass
class Row:
    """One server with one method; counts are those of the timed requests."""

    server: str
    method: str
    start_seconds: float
    step_ms: float
    """Time of all requests, one at a time, divided by their decode steps; the prefill of 64 tokens is in it."""
    tokens_per_s: float
    drafted: int
    accepted: int
    collectives_per_step: float | None
    fallbacks: int | None
    tokens: list[list[int]]


def make_head(folder: Path, target: Mapping[str, Any]) -> Path:
    """The configuration of an EAGLE3 head of one Llama layer for a model with the configuration `target`."""
    folder.mkdir()
    same = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps")
    layers = int(target["num_hidden_layers"])
    config = {name: target[name] for name in same} | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "draft_vocab_size": target["vocab_size"],
        "intermediate_size": 3 * int(target["hidden_size"]),
        "num_hidden_layers": 1,
        "max_position_embeddings": target["max_position_embeddings"],
        "tie_word_embeddings": False,
        "torch_dtype": target.get("torch_dtype", "bfloat16"),
        "eagle_aux_hidden_state_layer_ids": [1, layers // 2, layers - 1],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_model(folder: Path, name: str) -> Path:
    """A folder with the configuration `name` of `configs/models` and a tokenizer of as many words."""
    if name == MODELS["cpu"]:
        return make_tiny_model(folder, "moe")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder.mkdir()
    text = (configs_folder() / "models" / name / "config.json").read_text()
    (folder / "config.json").write_text(text)
    tokenizer = Tokenizer(WordLevel({f"t{token}": token for token in range(json.loads(text)["vocab_size"])}, "t0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "eos_token": "t1"})
    )
    return folder


def speculation(method: str, head: Path, device: str) -> list[str]:
    """`--speculative-config` for `none`, `eagle3:N` or `ngram:N`, N drafted tokens."""
    name, _, drafted = method.partition(":")
    if name == "none":
        return []
    settings: dict[str, object] = {"method": name, "num_speculative_tokens": int(drafted)}
    if name == "ngram":
        settings |= {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
    else:
        settings["model"] = str(head)
        if device == "cuda":
            settings["attention_backend"] = "TRITON_ATTN"
    return ["--speculative-config", json.dumps(settings)]


@contextmanager
def served(
    group: ProcessGroup, kind: str, model: Path, method: str, head: Path, args: argparse.Namespace
) -> Iterator[tuple[str, float]]:
    """Starts a server of `kind`, one of `SERVERS`; yields its URL and the seconds of its start."""
    port, spark_port = free_ports(2)
    cuda = args.device == "cuda"
    argv = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--load-format", "dummy"),
        *("--host", LOOPBACK, "--port", str(port)),
        *("--max-model-len", "2048", "--max-num-seqs", "8", "--no-enable-prefix-caching", "--seed", "0"),
        *speculation(method, head, args.device),
        *(("--attention-backend", "TRITON_ATTN") if cuda else ("--enforce-eager", "--dtype", "float32")),
        *(("--gpu-memory-utilization", ONE_GPU_SHARE) if args.one_gpu else ()),
        *args.serve_argument,
    ]
    common = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    common |= {} if cuda else CPU_ENVIRONMENT
    common |= {"VLLM_DISABLE_PYNCCL": "1"} if args.one_gpu else {}  # NCCL does not take two ranks on one GPU
    name = f"{kind}-{method.replace(':', '-')}"
    with ExitStack() as stack:
        processes: list[Process] = []

        def start(what: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
            log = f"{name}-{len(processes)}.log"
            everything = clean_environment() | common | dict(environment)
            processes.append(stack.enter_context(group.started(f"{name}: {what}", command, log, everything)))

        since = time.monotonic()
        second = "0" if args.one_gpu else "1"
        if kind == "one-rank":
            start("vllm serve", argv, {"CUDA_VISIBLE_DEVICES": "0"})
        elif kind == "stock":
            alone = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0", "NCCL_P2P_DISABLE": "1"}
            pair = ["--tensor-parallel-size", "2", "--disable-custom-all-reduce"]
            start("vllm serve", [*argv, *pair], alone if cuda else {})
        else:
            secret = {SECRET_VARIABLE: os.urandom(16).hex()}
            join = python_module("vllm_spark", "join", "--once", "--leader", LOOPBACK, "--port", str(spark_port))
            wire = ["--spark-loopback-mode", "proxied"] if kind == "spark-wire" else []
            spark = ["--spark", "--spark-address", LOOPBACK, "--spark-port", str(spark_port)]
            start("vllm-spark join", join, secret | {"CUDA_VISIBLE_DEVICES": second})
            start(
                "vllm serve --spark",
                [*argv, *spark, "--spark-transport", "loopback", *wire],
                secret | {"CUDA_VISIBLE_DEVICES": "0"},
            )

        def healthy() -> bool:
            for process in processes:
                if process.exit_code is not None:
                    raise SparkError(f"{process.name} ended with exit code {process.exit_code} while starting")
            return answers(f"http://{LOOPBACK}:{port}/health")

        processes[-1].wait_until(healthy, START_SECONDS, "become healthy")
        yield f"http://{LOOPBACK}:{port}", time.monotonic() - since


def counters(url: str) -> dict[str, float]:
    """The samples of `/metrics`, added up over labels but for the rank, of which rank 0's count."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    values: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("rank", "0") == "0":
                values[sample.name] += sample.value
    return values


def counters_at_rest(url: str) -> dict[str, float]:
    """The counters of an idle server: a rank shows them some time after its work, so they are read until they stay.

    Raises:
        SparkError: they changed for `REST_SECONDS`.
    """
    deadline = time.monotonic() + REST_SECONDS
    seen = counters(url)
    while time.monotonic() < deadline:
        time.sleep(SHOWN_EVERY)
        before, seen = seen, counters(url)
        if all(before.get(name) == value for name, value in seen.items() if name.startswith(("vllm_spark_", "vllm:s"))):
            return seen
    raise SparkError(f"the counters of {url}/metrics still changed after {REST_SECONDS:g} s without a request")


def measure(url: str, server: str, method: str, start_seconds: float, vocabulary: int, length: int) -> Row:
    """Asks `PROMPTS` prompts one by one, twice, the second time with times and counts."""
    client = OpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        timeout=300,
        max_retries=0,
        http_client=DefaultHttpxClient(trust_env=False),
    )
    model = client.models.list().data[0].id

    def ask(number: int) -> list[int]:
        prompt = [(31 * number + 7 * position + 11) % vocabulary for position in range(64)]
        completion = client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=length,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        return list((completion.choices[0].model_extra or {})["token_ids"])

    warm = [ask(number) for number in range(PROMPTS)]
    before = counters_at_rest(url)
    since = time.perf_counter()
    tokens = [ask(number) for number in range(PROMPTS)]
    seconds = time.perf_counter() - since
    if tokens != warm:
        raise SparkError(f"{server}, {method}: the same prompts gave other tokens the second time")
    after = counters_at_rest(url)
    new = {name: value - before.get(name, 0) for name, value in after.items()}
    steps = new.get("vllm:spec_decode_num_drafts_total", 0) or length * PROMPTS
    collectives = [new.get(f"vllm_spark_{name}_total", 0) for name in ("all_reduces", "all_gathers")]
    return Row(
        server,
        method,
        start_seconds,
        1e3 * seconds / steps,
        PROMPTS * length / seconds,
        round(new.get("vllm:spec_decode_num_draft_tokens_total", 0)),
        round(new.get("vllm:spec_decode_num_accepted_tokens_total", 0)),
        sum(collectives) / steps if server.startswith("spark") else None,
        round(after.get("vllm_spark_fallbacks_total", 0)) if server.startswith("spark") else None,
        tokens,
    )


def show(rows: Sequence[Row], console: Console) -> None:
    """A table; tokens are compared with the first row's."""
    table = Table("server", "method", "start, s", "step, ms", "tokens/s", "drafted", "accepted", "collectives a step")
    table.add_column("fallbacks")
    table.add_column("tokens")
    for row in rows:
        count = "" if row.collectives_per_step is None else f"{row.collectives_per_step:.1f}"
        equal = "equal" if row.tokens == rows[0].tokens else "OTHER"
        table.add_row(
            *(row.server, row.method, f"{row.start_seconds:.0f}", f"{row.step_ms:.2f}", f"{row.tokens_per_s:.0f}"),
            *(str(row.drafted), str(row.accepted), count, str(row.fallbacks), equal),
        )
    console.print(table)
    console.print(f"different tokens in the first row's answers: {[len(set(answer)) for answer in rows[0].tokens]}")


def main() -> int:
    """Runs all candidates; returns 1 if tokens or counts are not as they must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=sorted(MODELS), default="cuda")
    parser.add_argument("--one-gpu", action="store_true", help="both ranks on one GPU: a test of function")
    parser.add_argument("--servers", help=f"{', '.join(SERVERS)}; default: spark,stock, with --one-gpu spark,one-rank")
    parser.add_argument("--methods", default=",".join(METHODS), help="none, eagle3:N, ngram:N")
    parser.add_argument("--tokens", type=int, default=256, help="length of each answer")
    parser.add_argument("--serve-argument", action="append", default=[], help="a further argument of vllm serve")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--keep-logs", type=Path)
    args = parser.parse_args()
    console = Console(width=140)
    rows: list[Row] = []
    with process_group("served-speculation", console, args.keep_logs) as group:
        model = make_model(group.folder / "model", MODELS[args.device])
        config = json.loads((model / "config.json").read_text())
        head = make_head(group.folder / "head", config)
        for method in args.methods.split(","):
            for server in (args.servers or ("spark,one-rank" if args.one_gpu else "spark,stock")).split(","):
                with served(group, server, model, method, head, args) as (url, start_seconds):
                    rows.append(measure(url, server, method, start_seconds, config["vocab_size"], args.tokens))
                show(rows, console)
                if args.json is not None:
                    args.json.write_text(json.dumps([asdict(row) for row in rows]))
    return 0 if all(row.tokens == rows[0].tokens and not row.fallbacks for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
