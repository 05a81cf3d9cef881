"""Runs a function on two ranks as processes of this machine, and passes on what they report.

Both processes are stopped when one fails, or at the time limit.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from vllm_spark.errors import SparkError, described
from vllm_spark.processes.child import watch_parent
from vllm_spark.processes.local import free_ports
from vllm_spark.ranks import WORLD_SIZE

_CONNECT_SECONDS = 120.0


@dataclass
class Rank:
    """The argument of a rank's function.

    Attributes:
        index: 0 or 1.
        port: of 127.0.0.1, free when the ranks were started: for torch's rendezvous.
    """

    index: int
    port: int
    _peer: Connection
    _results: Connection

    def exchange(self, mine: bytes) -> bytes:
        """Sends `mine` to the other rank, and returns the other rank's bytes.

        Raises:
            SparkError: the other rank did not take part in time, or exited.
        """
        try:
            self._peer.send_bytes(mine)
            if self._peer.poll(_CONNECT_SECONDS):
                return self._peer.recv_bytes()
        except (EOFError, OSError):
            raise SparkError("the other rank ended") from None
        raise SparkError(f"the other rank did not take part in the exchange within {_CONNECT_SECONDS:.0f} s")

    def report(self, value: Any) -> None:
        """Sends a picklable value to the process that started the ranks."""
        self._results.send((None, value))


def run_ranks(
    body: Callable[..., None],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    timeout: float = 900.0,
    on_report: Callable[[Any], None],
) -> None:
    """Runs `body(rank, *arguments)` in two processes, and passes on their reports.

    Args:
        body: a function of a module, with picklable arguments.
        environment: variables of both ranks, in addition to this process's.
        timeout: seconds for all of it.
        on_report: called with each reported value.

    Raises:
        SparkError: a rank failed or took too long; both processes have been stopped.
    """
    context = multiprocessing.get_context("spawn")
    (port,) = free_ports(1)
    ends, pipes = context.Pipe(), [context.Pipe(duplex=False) for _ in range(WORLD_SIZE)]
    processes = [
        context.Process(
            target=_run,
            args=(Rank(index, port, ends[index], pipes[index][1]), body, arguments, dict(environment or {})),
            daemon=True,
        )
        for index in range(WORLD_SIZE)
    ]
    try:
        for process in processes:
            process.start()
        for connection in (*ends, *(sender for _, sender in pipes)):
            connection.close()  # only the ranks hold them now, so that a rank's exit closes its end
        _listen({receiver: index for index, (receiver, _) in enumerate(pipes)}, timeout, on_report)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _listen(open_ends: dict[Connection, int], timeout: float, on_report: Callable[[Any], None]) -> None:
    deadline = time.monotonic() + timeout
    done: set[int] = set()
    while open_ends:
        ready = wait(list(open_ends), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise SparkError(f"the measurement did not end within {timeout:.0f} s")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            index = open_ends[receiver]
            try:
                failure, value = receiver.recv()
            except EOFError:
                del open_ends[receiver]
                if index not in done:
                    raise SparkError(f"rank {index} exited without a result; see its output above") from None
                continue
            if failure is not None:
                raise SparkError(f"rank {index} failed: {failure}")
            if value == _DONE:
                done.add(index)
            else:
                on_report(value)


_DONE = "done"


def _run(rank: Rank, body: Callable[..., None], arguments: tuple[Any, ...], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    watch_parent(lambda: os._exit(1))
    try:
        body(rank, *arguments)
        rank._results.send((None, _DONE))
    except SparkError as error:
        rank._results.send((str(error), None))
    except Exception as error:
        traceback.print_exc()
        rank._results.send((described(error), None))
