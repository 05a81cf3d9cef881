"""Serves one model by this project's pair over the modelled link and by vLLM's own pair; times streams and prefills.

    python -m benchmarks.served_streams --json FILE

Both are real servers (`vllm serve`), asked over HTTP, in turns and by the same requests, so that whatever else the
machine does falls on both. So many streams ask one request after the other, all of the same lengths; their tokens per
second are all tokens of all answers over the time from the first request to the last answer. A prefill is a request for
one token. The ratio is the median of the rounds' ratios to the last server.

vLLM's own pair exchanges data with NCCL through host memory, over no wire; this project's pair waits for a modelled
one. Needs two GPUs. `--device cpu` tests the function, not the speed: then both ranks of a pair share the cores.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from openai import DefaultHttpxClient, OpenAI
from rich.console import Console
from rich.table import Table

from vllm_spark.cli.arguments import positive, positives
from vllm_spark.errors import SparkError
from vllm_spark.processes.group import process_group

from .served_model import MODELS, make_model
from .servers import SERVERS, START_SECONDS, Place, Started, start_server

REQUESTS_PER_STREAM = 2
ROOM = 16  # tokens of the context that no request uses
ON_A_GPU = (
    *("--attention-backend", "TRITON_ATTN"),
    *("--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(4 << 30)),  # two servers share the GPUs
)
ON_A_CPU = ("--enforce-eager", "--dtype", "float32")


@dataclass
class Row:
    """One server's figures of one kind of load, one of each round.

    Attributes:
        server: one of `SERVERS`.
        streams: requests at once; 0 for a prefill.
        figures: tokens per second, or seconds of a prefill.
    """

    server: str
    streams: int
    figures: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.figures)

    def times_as_fast_as(self, other: Row) -> float:
        """The median of the rounds' ratios."""
        ratios = [mine / theirs for mine, theirs in zip(self.figures, other.figures, strict=True)]
        return statistics.median(ratios if self.streams else [1 / ratio for ratio in ratios])


class Asker:
    """Asks one server for completions of random prompts, which are the same for every server."""

    def __init__(self, url: str, vocabulary: int) -> None:
        http = DefaultHttpxClient(trust_env=False)
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0, http_client=http)
        self._model = self._client.models.list().data[0].id
        self._vocabulary = vocabulary

    def ask(self, seed: int, prompt_tokens: int, answer_tokens: int) -> None:
        """One request.

        Raises:
            OpenAIError: it failed.
            SparkError: the answer has another length.
        """
        chance = random.Random(seed)
        completion = self._client.completions.create(
            model=self._model,
            prompt=[chance.randrange(3, self._vocabulary) for _ in range(prompt_tokens)],
            max_tokens=answer_tokens,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        if completion.usage is None or completion.usage.completion_tokens != answer_tokens:
            raise SparkError(f"an answer has {completion.usage} instead of {answer_tokens} tokens")

    def tokens_per_second(self, streams: int, prompt_tokens: int, answer_tokens: int, seed: int) -> float:
        """Of so many streams, each of `REQUESTS_PER_STREAM` requests."""

        def stream(number: int) -> None:
            for turn in range(REQUESTS_PER_STREAM):
                self.ask(seed + 1000 * number + turn, prompt_tokens, answer_tokens)

        with ThreadPoolExecutor(streams) as pool:
            since = time.perf_counter()
            for done in [pool.submit(stream, number) for number in range(streams)]:
                done.result()
            seconds = time.perf_counter() - since
        return streams * REQUESTS_PER_STREAM * answer_tokens / seconds

    def prefill_seconds(self, prompt_tokens: int, seed: int) -> float:
        """Of a request for one token."""
        since = time.perf_counter()
        self.ask(seed, prompt_tokens, 1)
        return time.perf_counter() - since


def measure(askers: dict[str, Asker], args: argparse.Namespace) -> list[Row]:
    """All loads on all servers, in turns; each load once before, untimed."""
    rows = {(name, streams): Row(name, streams) for streams in (*args.streams, 0) for name in askers}
    for turn in range(args.rounds + 1):
        for streams in (*args.streams, 0):
            for name, asker in askers.items():
                seed = 100_000 * turn + streams
                if streams:
                    figure = asker.tokens_per_second(streams, args.prompt_tokens, args.answer_tokens, seed)
                else:
                    figure = asker.prefill_seconds(args.prefill_tokens, seed)
                if turn > 0:
                    rows[name, streams].figures.append(figure)
    return list(rows.values())


def show(rows: list[Row], args: argparse.Namespace, console: Console) -> None:
    """A table; the last server is the one that ratios refer to."""
    reference = rows[-1].server
    by_key = {(row.server, row.streams): row for row in rows}
    table = Table("load", "server", "median", "least", "most", f"times as fast as {reference}")
    for row in rows:
        load = f"a prefill of {args.prefill_tokens} tokens: seconds"
        if row.streams:
            plural = "s" if row.streams > 1 else ""
            load = f"{row.streams} stream{plural}, {args.prompt_tokens} tokens in, {args.answer_tokens} out: tokens/s"
        digits = 1 if row.streams else 4
        figures = [f"{value:.{digits}f}" for value in (row.median, min(row.figures), max(row.figures))]
        ratio = row.times_as_fast_as(by_key[reference, row.streams])
        table.add_row(load, row.server, *figures, f"{ratio:.2f}")
    console.print(table)


def start_all(args: argparse.Namespace, model: Path, place: Place, stack: ExitStack) -> dict[str, Started]:
    """All servers, healthy; they load together.

    Raises:
        SparkError: one has not become healthy in time.
    """
    longest = max(args.prefill_tokens + 1, args.prompt_tokens + args.answer_tokens) + ROOM
    arguments = [
        *("--load-format", "dummy", "--seed", "0", "--no-enable-prefix-caching", "--max-model-len", str(longest)),
        *("--max-num-seqs", str(max(args.streams)), *(ON_A_GPU if args.device == "cuda" else ON_A_CPU)),
        *args.serve_argument,
    ]
    servers = {}
    for name in args.servers.split(","):
        servers[name] = start_server(name, name, model, arguments, place)
        stack.callback(servers[name].stop)
    deadline = time.monotonic() + args.start_seconds
    for started in servers.values():
        started.wait_until_healthy(max(0.0, deadline - time.monotonic()))
    return servers


def main() -> int:
    """Starts, measures and shows all servers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=sorted(MODELS), default="cuda")
    parser.add_argument("--servers", default="spark-wire,stock", help=f"of {', '.join(SERVERS)}")
    parser.add_argument("--streams", type=positives, default=(1, 4, 16), help="requests at once (default: 1,4,16)")
    parser.add_argument("--prompt-tokens", type=positive, default=512)
    parser.add_argument("--answer-tokens", type=positive, default=160)
    parser.add_argument("--prefill-tokens", type=positive, default=8000)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--serve-argument", action="append", default=[], help="a further argument of vllm serve")
    parser.add_argument("--start-seconds", type=float, default=START_SECONDS, help="for all servers to become healthy")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--keep-logs", type=Path)
    args = parser.parse_args()
    console = Console(width=140)
    with process_group("served-streams", console, args.keep_logs) as group, ExitStack() as stack:
        model = make_model(group.folder / "model", MODELS[args.device])
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        place = Place(args.device, group.logs, group.folder / "caches")
        servers = start_all(args, model, place, stack)
        for started in servers.values():
            console.print(f"{started.name}: healthy after {started.ready_seconds:.0f} s")
        rows = measure({name: Asker(started.url, vocabulary) for name, started in servers.items()}, args)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows]))
    show(rows, args, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
