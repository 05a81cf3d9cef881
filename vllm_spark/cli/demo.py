"""`vllm-spark demo`: the product on one machine, with a tiny model and two real processes over loopback.

What is started is what a user types: `vllm-spark join` and `vllm serve MODEL --spark`. Afterwards one stock rank
(`vllm serve MODEL`) answers the same prompts, and the token ids must be equal. One server at a time, so that two
cores are enough.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_spark.cli.arguments import up_to
from vllm_spark.errors import ConfigurationError, SparkError
from vllm_spark.local_pair import CPU_ENVIRONMENT, LOOPBACK, free_ports
from vllm_spark.process import Process, ProcessError, answers, clean_environment, program
from vllm_spark.stage import Stage, printable, set_stage
from vllm_spark.tiny_model import ModelKind, make_tiny_model

if TYPE_CHECKING:
    from openai import OpenAI

SUMMARY = "show the product on this machine: a tiny model on two ranks over loopback, compared with one rank"

MODEL_NAME = "tiny"
NEEDED = ("openai", "safetensors", "tokenizers", "torch", "prometheus_client")
TOKEN_PROMPTS = (
    "def main(",
    "The cable between the two desks carries",
    "1, 1, 2, 3, 5, 8, 13, ",
    "class Process:\n    def __init__(self, name):\n        ",
    "二つの机、一つのモデル。",
    "if x == 0: return None\nelif",
)
PHASES = (
    ("vLLM starts", r"."),
    ("weights", r"Starting to load model"),
    ("the engine warms up", r"Loading weights took"),
)
"""What the leader is doing, and the line of its log that tells."""

COUNTER_SECONDS = 15.0
"""How long both ranks' counters may take to come to rest on the leader's `/metrics`."""

REST_SECONDS = 2.0
"""Counters that have not changed for so long are at rest: longer than a rank takes to report."""


@dataclass(frozen=True)
class Counters:
    """What one rank has counted since it started: calls, bytes, and calls left to vLLM's own path."""

    all_reduces: int
    all_reduce_bytes: int
    all_gathers: int
    all_gather_bytes: int
    fallbacks: int


@dataclass(frozen=True)
class _Server:
    """A server that answers at `url`, and the seconds that it took until then."""

    url: str
    process: Process
    start_seconds: float


@dataclass(frozen=True)
class Run:
    """What one server did: its token ids, prompt by prompt, and how long it took in seconds."""

    tokens: list[list[int]]
    start_seconds: float
    token_seconds: float
    ranks: tuple[Counters, ...] = ()


@dataclass(frozen=True)
class Summary:
    """The outcome as `--json` prints it; `all_reduces` and `all_gathers` are those of rank 0."""

    ok: bool
    tokens: int
    identical: bool
    all_reduces: int
    all_gathers: int
    fallbacks: int
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `vllm-spark demo`."""
    kinds = get_args(ModelKind)
    parser.add_argument(
        "--model-kind", choices=kinds, default="moe", help="tiny Qwen3-MoE or tiny Qwen3 (default: moe)"
    )
    parser.add_argument("--prompt", default="What joins two desks?", help="the chat question (default: %(default)s)")
    parser.add_argument(
        "--max-tokens",
        type=up_to(512, int),
        default=32,
        metavar="N",
        help="length of every answer, at most 512 (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=up_to(86400),
        default=900.0,
        metavar="SECONDS",
        help="give up after this time (default: %(default)g)",
    )
    parser.add_argument("--keep-logs", type=Path, metavar="DIR", help="write the servers' output there and keep it")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object to standard output, all else to standard error"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo; 0 if two ranks gave the token ids of one, 1 if not.

    Raises:
        SparkError: it could not be shown; the processes are ended and the logs kept.
    """
    console = Console(stderr=args.json, highlight=False)
    try:
        _check_installation()
        with set_stage("demo", console, args.keep_logs) as stage:
            summary = _Demo(args, console, stage).run()
    except SparkError as error:
        if args.json:
            print(json.dumps({"ok": False, "error": str(error)}), flush=True)
        raise
    if args.json:
        print(json.dumps(asdict(summary)), flush=True)
    return 0 if summary.ok else 1


class _Demo:
    """One run of the demo."""

    def __init__(self, args: argparse.Namespace, console: Console, stage: Stage) -> None:
        self._kind: ModelKind = args.model_kind
        self._prompt: str = args.prompt
        self._max_tokens: int = args.max_tokens
        self._console = console
        self._started = time.monotonic()
        self._timeout: float = args.timeout
        self._stage = stage

    def run(self) -> Summary:
        """Shows the pair and then one rank."""
        say = self._console.print
        model = self._stage.folder / f"tiny-{self._kind}"
        say(f"[bold]1. A tiny {self._kind} model[/] with random weights: what it says is noise.")
        make_tiny_model(model, self._kind)
        say("[bold]2. The pair:[/] vllm-spark join, and vllm serve MODEL --spark")
        with self._pair(model) as server:
            self._chat(server)
            before = time.monotonic()
            tokens = self._greedy(server)
            pair = Run(tokens, server.start_seconds, time.monotonic() - before, read_counters(server))
        say("[bold]3. One rank of stock vLLM[/] with the same model, to compare with: vllm serve MODEL")
        with self._single(model) as server:
            before = time.monotonic()
            tokens = self._greedy(server)
            single = Run(tokens, server.start_seconds, time.monotonic() - before)
        return self._conclude(pair, single)

    @contextmanager
    def _pair(self, model: Path) -> Iterator[_Server]:
        """Follower and leader, while they serve."""
        spark_port, http_port = free_ports(2)
        environment = clean_environment() | CPU_ENVIRONMENT
        join = [program("vllm-spark"), *follower_arguments(spark_port)]
        serve = [program("vllm"), *serve_arguments(model, http_port), *leader_arguments(spark_port)]
        with (
            self._stage.started("vllm-spark join", join, "follower.log", environment) as follower,
            self._stage.started("vllm serve --spark", serve, "leader.log", environment) as leader,
        ):
            yield self._ready(leader, http_port, follower)
            for process in (leader, follower):
                if process.exit_code is not None:
                    raise ProcessError(f"{process.name} ended early, exit code {process.exit_code}", process)

    @contextmanager
    def _single(self, model: Path) -> Iterator[_Server]:
        """Stock vLLM, while it serves."""
        (http_port,) = free_ports(1)
        serve = [program("vllm"), *serve_arguments(model, http_port)]
        environment = clean_environment() | CPU_ENVIRONMENT
        with self._stage.started("vllm serve", serve, "single.log", environment) as server:
            yield self._ready(server, http_port)

    def _ready(self, process: Process, port: int, follower: Process | None = None) -> _Server:
        """Waits until the server answers, showing what it does meanwhile."""
        before = time.monotonic()
        url = f"http://{LOOPBACK}:{port}"
        with _Phases(self._console) as phases:
            if follower is not None:
                phases.enter("the follower waits for its leader")

            def ready() -> bool:
                if follower is not None and follower.exit_code is not None:
                    raise ProcessError(
                        f"{follower.name} ended while the leader started, exit code {follower.exit_code}", follower
                    )
                output = process.output()
                for name, pattern in reversed(PHASES):
                    if re.search(pattern, output):
                        phases.enter(name)
                        break
                return answers(f"{url}/health")

            process.wait_until(ready, self._remaining(), "become ready")
            phases.enter("ready")
        return _Server(url, process, time.monotonic() - before)

    def _chat(self, server: _Server) -> None:
        """Asks the chat question and prints the answer as it comes."""
        self._console.print(f"   [cyan]You:[/] {printable(self._prompt)}", markup=True)
        self._console.print("   [cyan]Noise:[/] ", end="")
        with self._client(server) as client:
            stream = client.chat.completions.create(
                model=MODEL_NAME,
                messages=[{"role": "user", "content": self._prompt}],
                max_tokens=self._max_tokens,
                temperature=0,
                stream=True,
            )
            for chunk in stream:
                text = chunk.choices[0].delta.content if chunk.choices else None
                self._console.print(printable(text or ""), end="", markup=False, soft_wrap=True)
        self._console.print()

    def _greedy(self, server: _Server) -> list[list[int]]:
        """The token ids of the greedy answers to the prompts."""
        with self._client(server) as client:
            return [self._greedy_answer(client, prompt) for prompt in (*TOKEN_PROMPTS, self._prompt)]

    def _greedy_answer(self, client: OpenAI, prompt: str) -> list[int]:
        completion = client.completions.create(
            model=MODEL_NAME,
            prompt=prompt,
            max_tokens=self._max_tokens,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        return list((completion.choices[0].model_extra or {})["token_ids"])

    @contextmanager
    def _client(self, server: _Server) -> Iterator[OpenAI]:
        """The official client; what goes wrong with it is an error of the server that it asks."""
        import httpx
        from openai import DefaultHttpxClient, OpenAI, OpenAIError

        client = OpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            timeout=self._remaining(),
            max_retries=0,
            http_client=DefaultHttpxClient(trust_env=False),  # a proxy has no business on loopback
        )
        try:
            with client:
                yield client
        except (OpenAIError, httpx.HTTPError) as error:  # the client leaves errors within a stream as they are
            raise ProcessError(f"{server.process.name} did not answer: {error}", server.process) from error

    def _remaining(self) -> float:
        """Seconds left of the time that the user gave, at least one: what is waited for then names itself."""
        return max(1.0, self._started + self._timeout - time.monotonic())

    def _conclude(self, pair: Run, single: Run) -> Summary:
        rank0, rank1 = pair.ranks
        identical = pair.tokens == single.tokens
        summary = Summary(
            ok=identical and min(rank0.all_reduces, rank1.all_reduces) > 0 and rank0.fallbacks + rank1.fallbacks == 0,
            tokens=sum(map(len, pair.tokens)),
            identical=identical,
            all_reduces=rank0.all_reduces,
            all_gathers=rank0.all_gathers,
            fallbacks=rank0.fallbacks + rank1.fallbacks,
            seconds=round(time.monotonic() - self._started, 1),
        )
        self._console.print(_table(pair, single))
        self._console.print(
            "Times are of ranks that share this machine's cores: they say nothing about speed.", soft_wrap=True
        )
        if not identical:
            self._console.print(f"[bold red]The tokens differ:[/] {_first_difference(pair.tokens, single.tokens)}")
        elif summary.fallbacks:
            self._console.print("[bold red]Some collectives went to vLLM's own path[/] and not through the runtime.")
        elif not summary.ok:
            self._console.print("[bold red]A rank has counted no all-reduce:[/] the pair did not work together.")
        else:
            self._console.print(
                f"[bold green]All {summary.tokens} token ids of the pair are those of one rank.[/] "
                f"{summary.seconds:.0f} s in all."
            )
        return summary


def follower_arguments(spark_port: int) -> list[str]:
    """What follows `vllm-spark` on the second machine."""
    return ["join", "--leader", LOOPBACK, "--port", str(spark_port)]


def leader_arguments(spark_port: int) -> list[str]:
    """What `--spark` adds to `vllm serve`."""
    return [
        *("--spark", "--spark-address", LOOPBACK, "--spark-port", str(spark_port)),
        *("--spark-transport", "loopback"),
    ]


def serve_arguments(model: Path, http_port: int) -> list[str]:
    """What follows `vllm` on any machine, with one rank or two."""
    return [
        *("serve", str(model), "--served-model-name", MODEL_NAME),
        *("--host", LOOPBACK, "--port", str(http_port)),
        *("--dtype", "float32"),  # with bfloat16, ties between a random model's logits are common
        *("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16"),
    ]


def read_counters(server: _Server) -> tuple[Counters, Counters]:
    """The counters of both ranks, from the `/metrics` of a leader that has nothing to do.

    A rank shows its counters some time after its work, so they are read until they stand still.

    Raises:
        ProcessError: they are not exported, or do not come to rest.
    """
    names = {field.name: f"vllm_spark_{field.name}_total" for field in fields(Counters)}
    seen: list[dict[str, int]] = []
    seen_since = time.monotonic()

    def at_rest() -> bool:
        nonlocal seen, seen_since
        samples = _samples(server.url)
        now = [samples.get(rank, {}) for rank in ("0", "1")]
        if now != seen:
            seen, seen_since = now, time.monotonic()
        complete = all(name in rank for rank in seen for name in names.values())
        return complete and time.monotonic() - seen_since >= REST_SECONDS

    try:
        server.process.wait_until(at_rest, COUNTER_SECONDS, "shown counters at rest of both ranks")
    except (OSError, HTTPException) as error:
        raise ProcessError(f"{server.process.name} does not show its metrics: {error}", server.process) from error
    first, second = (Counters(**{field: rank[name] for field, name in names.items()}) for rank in seen)
    return first, second


def _samples(url: str) -> dict[str, dict[str, int]]:
    """The samples of a server's `/metrics` that belong to a rank, by rank and name."""
    from prometheus_client.parser import text_string_to_metric_families

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    samples: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "rank" in sample.labels:
                samples[sample.labels["rank"]][sample.name] = int(sample.value)
    return samples


class _Phases:
    """Shows what is going on, phase by phase, each with the time that it takes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name = ""
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("  "),
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> _Phases:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        self._progress.stop()

    def enter(self, name: str) -> None:
        """Ends the phase before and begins this one; does nothing if it has begun."""
        if name == self._name:
            return
        self._finish()
        self._name = name
        self._task = self._progress.add_task(name, total=1)
        if not self._console.is_terminal:  # a file or a pipe gets a line for each phase
            self._console.print(f"   {name}")

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=1)


def _table(pair: Run, single: Run) -> Table:
    table = Table("", "the pair", "one rank", title="Two ranks against one")
    for column in table.columns[1:]:
        column.justify = "right"

    def both(name: str) -> str:
        return " / ".join(f"{getattr(rank, name):,}" for rank in pair.ranks)

    table.add_row("ranks", str(len(pair.ranks)), "1")
    table.add_row("tokens compared", str(sum(map(len, pair.tokens))), str(sum(map(len, single.tokens))))
    table.add_row("seconds to start", f"{pair.start_seconds:.1f}", f"{single.start_seconds:.1f}")
    table.add_row("seconds for the tokens", f"{pair.token_seconds:.1f}", f"{single.token_seconds:.1f}")
    table.add_section()
    table.add_row("all-reduces, rank 0 / rank 1", both("all_reduces"), "")
    table.add_row("bytes all-reduced", both("all_reduce_bytes"), "")
    table.add_row("all-gathers", both("all_gathers"), "")
    table.add_row("bytes all-gathered", both("all_gather_bytes"), "")
    table.add_row("left to vLLM's own path", both("fallbacks"), "")
    return table


def _first_difference(pair: list[list[int]], single: list[list[int]]) -> str:
    for number, (ours, theirs) in enumerate(zip(pair, single, strict=True), start=1):
        for position, (our_token, their_token) in enumerate(zip(ours, theirs, strict=False), start=1):
            if our_token != their_token:
                return f"answer {number}, token {position} is {our_token} on the pair, {their_token} on one rank."
        if len(ours) != len(theirs):
            return f"answer {number} has {len(ours)} tokens on the pair, {len(theirs)} on one rank."
    raise AssertionError("equal answers have no difference")


def _check_installation() -> None:
    """Says what is missing before anything is started.

    Raises:
        ConfigurationError: vLLM's CPU build, or a package of the extra `demo`, is not installed.
    """
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigurationError(
            "vLLM is not installed beside this Python; `make demo` in the source tree installs its CPU build"
        ) from None
    if "cpu" not in version:
        raise ConfigurationError(
            f"the demo puts two ranks on one machine, which needs vLLM's CPU build, and this is vllm {version}; "
            "`make demo` in the source tree installs the CPU build into an environment of its own"
        )
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise ConfigurationError(
                f"the demo needs the package {package}; install it with: pip install 'vllm-spark[demo]'"
            )
