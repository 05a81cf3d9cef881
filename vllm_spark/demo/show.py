"""Runs the demo: starts the pair, then one rank, sends both the same prompts, and compares their tokens."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from vllm_spark.demo.comparison import Run, Summary, as_table, first_difference
from vllm_spark.demo.counters import read_counters
from vllm_spark.demo.programs import MODEL_NAME, Server, follower_arguments, leader_arguments, serve_arguments
from vllm_spark.models.tiny import ModelKind, make_tiny_model
from vllm_spark.processes.group import ProcessGroup, printable
from vllm_spark.processes.local import CPU_ENVIRONMENT, LOOPBACK, free_ports
from vllm_spark.processes.managed import Process, ProcessError, answers, clean_environment, program

if TYPE_CHECKING:
    from openai import OpenAI


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
"""Phases of the leader's start, and the log line with which each begins."""


@dataclass(frozen=True)
class Settings:
    """Settings of the demo.

    Attributes:
        model_kind: of the tiny model.
        prompt: the chat question, and the last prompt whose tokens are compared.
        max_tokens: length of every answer.
        timeout: seconds for all of it.
    """

    model_kind: ModelKind
    prompt: str
    max_tokens: int
    timeout: float


class Demo:
    """One run of the demo, with its processes in `programs` and its output on `console`."""

    def __init__(self, settings: Settings, console: Console, programs: ProcessGroup) -> None:
        self._settings = settings
        self._console = console
        self._started = time.monotonic()
        self._programs = programs

    def run(self) -> Summary:
        """Runs the pair and then one rank.

        Raises:
            SparkError: a program failed, or the time is over.
        """
        say = self._console.print
        model = self._programs.folder / f"tiny-{self._settings.model_kind}"
        say(f"[bold]1. A tiny {self._settings.model_kind} model[/] with random weights, whose text is random.")
        make_tiny_model(model, self._settings.model_kind)
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
    def _pair(self, model: Path) -> Iterator[Server]:
        """Starts follower and leader; yields them while they serve."""
        spark_port, http_port = free_ports(2)
        environment = clean_environment() | CPU_ENVIRONMENT
        join = [program("vllm-spark"), *follower_arguments(spark_port)]
        serve = [program("vllm"), *serve_arguments(model, http_port), *leader_arguments(spark_port)]
        with (
            self._programs.started("vllm-spark join", join, "follower.log", environment) as follower,
            self._programs.started("vllm serve --spark", serve, "leader.log", environment) as leader,
        ):
            yield self._ready(leader, http_port, follower)
            for process in (leader, follower):
                if process.exit_code is not None:
                    raise ProcessError(f"{process.name} ended early, exit code {process.exit_code}", process)

    @contextmanager
    def _single(self, model: Path) -> Iterator[Server]:
        """Starts stock vLLM; yields it while it serves."""
        (http_port,) = free_ports(1)
        serve = [program("vllm"), *serve_arguments(model, http_port)]
        environment = clean_environment() | CPU_ENVIRONMENT
        with self._programs.started("vllm serve", serve, "single.log", environment) as server:
            yield self._ready(server, http_port)

    def _ready(self, process: Process, port: int, follower: Process | None = None) -> Server:
        """Waits until the server is ready, and shows its phases."""
        before = time.monotonic()
        url = f"http://{LOOPBACK}:{port}"
        with Phases(self._console) as phases:
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

            try:
                process.wait_until(ready, self._remaining(), "become ready")
            except ProcessError as error:
                raise self._with_limit_hint(error) from None
            phases.enter("ready")
        return Server(url, process, time.monotonic() - before)

    def _chat(self, server: Server) -> None:
        """Sends the chat question, and prints the answer as it is generated."""
        self._console.print(f"   [cyan]You:[/] {printable(self._settings.prompt)}", markup=True)
        self._console.print("   [cyan]Noise:[/] ", end="")
        with self._client(server) as client:
            stream = client.chat.completions.create(
                model=MODEL_NAME,
                messages=[{"role": "user", "content": self._settings.prompt}],
                max_tokens=self._settings.max_tokens,
                temperature=0,
                stream=True,
            )
            for chunk in stream:
                text = chunk.choices[0].delta.content if chunk.choices else None
                self._console.print(printable(text or ""), end="", markup=False, soft_wrap=True)
        self._console.print()

    def _greedy(self, server: Server) -> list[list[int]]:
        """The token ids of the greedy answers to the prompts."""
        with self._client(server) as client:
            return [self._greedy_answer(client, prompt) for prompt in (*TOKEN_PROMPTS, self._settings.prompt)]

    def _greedy_answer(self, client: OpenAI, prompt: str) -> list[int]:
        completion = client.completions.create(
            model=MODEL_NAME,
            prompt=prompt,
            max_tokens=self._settings.max_tokens,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        return list((completion.choices[0].model_extra or {})["token_ids"])

    @contextmanager
    def _client(self, server: Server) -> Iterator[OpenAI]:
        """The official client; its errors are raised as ProcessError of the server."""
        import httpx
        from openai import DefaultHttpxClient, OpenAI, OpenAIError

        client = OpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            timeout=self._remaining(),
            max_retries=0,
            http_client=DefaultHttpxClient(trust_env=False),  # no proxy for loopback
        )
        try:
            with client:
                yield client
        except (OpenAIError, httpx.HTTPError) as error:  # the client leaves errors within a stream as they are
            raise ProcessError(f"{server.process.name} did not answer: {error}", server.process) from error

    def _remaining(self) -> float:
        """Seconds left of the user's time limit, at least one, so that the wait for a program names it."""
        return max(1.0, self._started + self._settings.timeout - time.monotonic())

    def _with_limit_hint(self, error: ProcessError) -> ProcessError:
        """`error`, or if the time is over, an error that names the user's limit and not the remaining part of it."""
        if time.monotonic() < self._started + self._settings.timeout:
            return error
        limit = f"the {self._settings.timeout:g} s of --timeout are over"
        return ProcessError(
            f"{limit} before {error.process.name if error.process else 'it'} was ready; give more", error.process
        )

    def _conclude(self, pair: Run, single: Run) -> Summary:
        summary = Summary.of(pair, single, time.monotonic() - self._started)
        self._console.print(as_table(pair, single))
        self._console.print(
            "Both ranks share this machine's cores: the times do not show the speed of a pair.", soft_wrap=True
        )
        if not summary.identical:
            self._console.print(f"[bold red]The tokens differ:[/] {first_difference(pair.tokens, single.tokens)}")
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


class Phases:
    """Shows the current phase and the time of each phase."""

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

    def __enter__(self) -> Phases:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        self._progress.stop()

    def enter(self, name: str) -> None:
        """Ends the previous phase and begins this one; does nothing in the same phase."""
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
