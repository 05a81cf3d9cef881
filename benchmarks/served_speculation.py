"""Serves one model with and without speculative decoding, by this project's pair and by vLLM's own, in one run.

    python -m benchmarks.served_speculation --json FILE

Every candidate is a real server (`vllm serve`), asked over HTTP. For each method: time of a decode step, tokens that
were drafted and accepted, collectives of one step, and whether the greedy tokens are those without speculation. Weights
and the EAGLE3 head are random (`--load-format dummy`), so a head's guesses are hardly ever accepted: a step costs what
it costs with a trained one. Its tokens must be those of vLLM's own pair with the same method, to the last bit of their
probabilities. In bfloat16 a step of several tokens has other roundings than a step of one, so with random weights they
may differ from those without speculation, in both pairs alike; the table then has how many are equal. With
`--norm-epsilon 1` the layers of the model add little to the embedding, and hardly any token is decided by a rounding.

Needs two GPUs (vLLM's own pair over host memory with NCCL, as between two machines). With `--one-gpu`, both ranks of
this project's pair share one, beside one rank of stock vLLM; with `--device cpu` no GPU is needed. Both test the
function, not the speed.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openai import DefaultHttpxClient, OpenAI, OpenAIError
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from vllm_spark.errors import SparkError
from vllm_spark.processes.group import process_group

from .served_model import MODELS, make_model
from .servers import SERVERS, START_SECONDS, Place, Started, start_server

METHODS = ("none", "eagle3:1", "eagle3:3")
ONE_GPU_SHARE = "0.42"
SEVERAL_ON_A_GPU = ("--gpu-memory-utilization", "0.14", "--kv-cache-memory-bytes", str(2 << 30))
"""So that up to six ranks of 9 GiB of weights start on one GPU at once: no rank measures what the others leave it."""
PROMPTS = 4
SHOWN_EVERY = 1.0
"""Seconds in which a rank shows its counters at least once."""
REST_SECONDS = 30.0
ERROR_LINES = 25
"""Of a failed process's output, that are kept with its row."""


@dataclass
class Row:
    """One server with one method; counts are those of the timed requests. All are 0 if it failed."""

    server: str
    method: str
    start_seconds: float = 0.0
    step_ms: float = 0.0
    """Time of all requests, one at a time, divided by their decode steps; the prefill of 64 tokens is in it."""
    tokens_per_s: float = 0.0
    drafted: int = 0
    accepted: int = 0
    collectives_per_step: float | None = None
    fallbacks: int | None = None
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    error: str = ""
    """Why it has no figures, with the last lines of its processes' output."""


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


def serve_arguments(method: str, head: Path, args: argparse.Namespace) -> list[str]:
    """The arguments of `vllm serve` that all servers have."""
    return [
        *("--load-format", "dummy", "--seed", "0", "--no-enable-prefix-caching"),
        *("--max-model-len", "2048", "--max-num-seqs", "8"),
        *speculation(method, head, args.device),
        *(
            ("--attention-backend", "TRITON_ATTN")
            if args.device == "cuda"
            else ("--enforce-eager", "--dtype", "float32")
        ),
        *(("--gpu-memory-utilization", ONE_GPU_SHARE) if args.one_gpu else ()),
        *(SEVERAL_ON_A_GPU if args.device == "cuda" and args.at_once > 1 else ()),
        *args.serve_argument,
    ]


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

    def ask(number: int, **options: Any) -> Any:
        prompt = [(31 * number + 7 * position + 11) % vocabulary for position in range(64)]
        completion = client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=length,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
            **options,
        )
        return completion.choices[0]

    def tokens_of(choice: Any) -> list[int]:
        return list((choice.model_extra or {})["token_ids"])

    warm = [ask(number, logprobs=1) for number in range(PROMPTS)]
    before = counters_at_rest(url)
    since = time.perf_counter()
    tokens = [tokens_of(ask(number)) for number in range(PROMPTS)]
    seconds = time.perf_counter() - since
    if tokens != [tokens_of(choice) for choice in warm]:
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
        [list(choice.logprobs.token_logprobs) for choice in warm],
    )


def same_length(tokens: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens at the beginning of each answer are the same."""
    return [
        next((place for place, (one, other) in enumerate(zip(mine, theirs, strict=True)) if one != other), len(mine))
        for mine, theirs in zip(tokens, others, strict=True)
    ]


def compared(row: Row, rows: Sequence[Row]) -> tuple[str, str]:
    """The row's tokens beside its server's without speculation, and tokens and probabilities beside stock's pair's."""
    by_key = {(other.server, other.method): other for other in rows if not other.error}
    plain, stock = by_key.get((row.server, METHODS[0])), by_key.get(("stock", row.method))
    without = "" if plain is None else "equal" if row.tokens == plain.tokens else str(_lengths(row, plain))
    beside = ""
    if stock is not None:
        beside = "equal" if row.tokens == stock.tokens else str(_lengths(row, stock))
        beside += "" if row.logprobs == stock.logprobs else ", other probabilities"
        beside += "" if row.accepted == stock.accepted else ", other acceptance"
    return without, beside


def _lengths(row: Row, other: Row) -> list[int]:
    return same_length(row.tokens, other.tokens)


def show(rows: Sequence[Row], console: Console) -> None:
    """A table; a list in it has the number of equal tokens at the beginning of each answer."""
    table = Table("server", "method", "start, s", "step, ms", "tokens/s", "drafted, accepted", "collectives a step")
    for title in ("fallbacks", "without speculation", "beside stock"):
        table.add_column(title)
    for row in rows:
        if row.error:
            table.add_row(row.server, row.method, *["-"] * 6, "failed")
            continue
        count = "" if row.collectives_per_step is None else f"{row.collectives_per_step:.1f}"
        table.add_row(
            *(row.server, row.method, f"{row.start_seconds:.0f}", f"{row.step_ms:.2f}", f"{row.tokens_per_s:.0f}"),
            *(f"{row.drafted}, {row.accepted}", count, str(row.fallbacks), *compared(row, rows)),
        )
    console.print(table)
    console.print(f"different tokens in the answers: {[[len(set(answer)) for answer in row.tokens] for row in rows]}")


def failed(server: str, method: str, started: Started | None, error: Exception) -> Row:
    """The row of a server that could not be measured."""
    tails = [] if started is None else [process.tail(ERROR_LINES) for process in started.processes]
    return Row(server, method, error="\n".join([f"{type(error).__name__}: {error}", *tails]))


def main() -> int:
    """Runs all candidates; returns 1 if one failed, or if its tokens or counts are not as they must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=sorted(MODELS), default="cuda")
    parser.add_argument("--one-gpu", action="store_true", help="both ranks on one GPU: a test of function")
    parser.add_argument("--servers", help=f"{', '.join(SERVERS)}; default: spark,stock, with --one-gpu spark,one-rank")
    parser.add_argument("--methods", default=",".join(METHODS), help="none, eagle3:N, ngram:N")
    parser.add_argument("--tokens", type=int, default=256, help="length of each answer")
    parser.add_argument("--serve-argument", action="append", default=[], help="a further argument of vllm serve")
    parser.add_argument("--norm-epsilon", type=float, help="rms_norm_eps of the model; 1: its layers add little")
    parser.add_argument("--at-once", type=int, default=1, help="servers that load together; asked one by one")
    parser.add_argument("--start-seconds", type=float, default=START_SECONDS, help="for a server to become healthy")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--keep-logs", type=Path)
    args = parser.parse_args()
    console = Console(width=180)
    rows: list[Row] = []
    servers = (args.servers or ("spark,one-rank" if args.one_gpu else "spark,stock")).split(",")
    wanted = [(server, method) for method in args.methods.split(",") for server in servers]
    with process_group("served-speculation", console, args.keep_logs) as group:
        model = make_model(group.folder / "model", MODELS[args.device])
        config = json.loads((model / "config.json").read_text())
        if args.norm_epsilon is not None:
            config["rms_norm_eps"] = args.norm_epsilon
            (model / "config.json").write_text(json.dumps(config))
        head = make_head(group.folder / "head", config)
        place = Place(args.device, group.logs, group.folder / "caches", args.one_gpu)
        more = {"VLLM_DISABLE_PYNCCL": "1"} if args.one_gpu else {}  # NCCL does not take two ranks on one GPU
        for first in range(0, len(wanted), args.at_once):
            with ExitStack() as stack:
                together: list[tuple[str, str, Started]] = []
                for server, method in wanted[first : first + args.at_once]:
                    name = f"{server}-{method.replace(':', '-')}"
                    arguments = serve_arguments(method, head, args)
                    started = start_server(server, name, model, arguments, place, environment=more)
                    stack.callback(started.stop)
                    together.append((server, method, started))
                deadline = time.monotonic() + args.start_seconds
                failures: dict[str, Exception] = {}
                for _, _, started in together:  # nothing is measured while another one loads
                    try:
                        started.wait_until_healthy(max(0.0, deadline - time.monotonic()))
                        console.print(f"{started.name}: healthy after {started.ready_seconds:.0f} s")
                    except SparkError as error:
                        failures[started.name] = error
                        started.kill()
                for server, method, started in together:
                    try:
                        if started.name in failures:
                            raise failures[started.name]
                        seconds, vocabulary = started.ready_seconds, config["vocab_size"]
                        rows.append(measure(started.url, server, method, seconds, vocabulary, args.tokens))
                    except (SparkError, OpenAIError, OSError) as error:
                        rows.append(failed(server, method, started, error))
                        console.print(rows[-1].error, markup=False)
                    show(rows, console)
                    if args.json is not None:
                        args.json.write_text(json.dumps([asdict(row) for row in rows]))
    return 0 if all(as_it_must_be(row, rows) for row in rows) else 1


def as_it_must_be(row: Row, rows: Sequence[Row]) -> bool:
    """It was measured, nothing fell back, and its answers are stock's or, without stock's pair, those of `none`."""
    without, beside = compared(row, rows)
    return not row.error and not row.fallbacks and (beside or without) in ("", "equal")


if __name__ == "__main__":
    raise SystemExit(main())
