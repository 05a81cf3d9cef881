"""Runs a function on two ranks, each a process of its own, joined by a pipe."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from vllm_spark.collective import Runtime, RuntimeOptions

BOUND = 120.0
"""Seconds after which a rank counts as hung. Nothing here takes that long, however busy the machine."""


@dataclass(frozen=True)
class Outcome:
    """What one rank's function returned, or what it raised."""

    value: Any = None
    error: BaseException | None = None
    exit_code: int | None = 0

    @property
    def message(self) -> str:
        return str(self.error)


class Pipe:
    """A rendezvous' exchange over a pipe, with a bound."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def __call__(self, mine: bytes) -> bytes:
        self.connection.send_bytes(mine)
        if not self.connection.poll(BOUND):
            raise TimeoutError("the other rank did not come to the exchange")
        return self.connection.recv_bytes()


Body = Callable[..., Any]


def connect(rank: int, exchange: Callable[[bytes], bytes], **options: Any) -> Runtime:
    """A connected runtime with a time-out of 30 s, if not said otherwise."""
    return Runtime.connect(
        rank, 2, exchange, RuntimeOptions(**{"timeout_s": 30.0, **options}), description=f"test rank {rank}"
    )


def run_pair(body: Body, *arguments: Any) -> tuple[Outcome, Outcome]:
    """Runs `body(rank, exchange, *arguments)` in two processes and returns both outcomes.

    A rank that hangs is killed and fails the test; one that dies of a signal has its exit code.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "vllm_spark.collective"])  # once: it takes seconds
    left, right = context.Pipe()
    ranks = []
    for rank, end in enumerate((left, right)):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(body, rank, end, theirs, arguments), daemon=True)
        process.start()
        theirs.close()
        ranks.append((process, mine))
    left.close()
    right.close()
    outcomes = []
    for process, results in ranks:
        try:
            outcome = pickle.loads(results.recv_bytes()) if results.poll(BOUND) else Outcome(error=TimeoutError("hung"))
        except EOFError:
            process.join(BOUND)
            outcome = Outcome(error=EOFError("the rank died"), exit_code=process.exitcode)
        outcomes.append(outcome)
    for process, _ in ranks:
        process.join(10)
        if process.exitcode is None:
            process.kill()
            process.join()
    assert not any(isinstance(outcome.error, TimeoutError) for outcome in outcomes), outcomes
    return outcomes[0], outcomes[1]


def values(body: Body, *arguments: Any) -> tuple[Any, Any]:
    """As `run_pair`, for bodies that must not fail."""
    outcomes = run_pair(body, *arguments)
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return outcomes[0].value, outcomes[1].value


def _run(body: Body, rank: int, end: Connection, results: Connection, arguments: tuple[Any, ...]) -> None:
    try:
        outcome = Outcome(body(rank, Pipe(end), *arguments))
    except Exception as error:
        error.add_note(traceback.format_exc()) if hasattr(error, "add_note") else None
        outcome = Outcome(error=error)
    results.send_bytes(pickle.dumps(outcome))
