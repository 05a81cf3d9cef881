"""Times kernels as a decode step runs them: in a CUDA graph, back to back, with weights that are not in a cache.

Candidates take turns within each round, and only ratios within a round are compared: the drift of clocks and load
between rounds exceeds the difference between two kernels. The module also has what such a measurement needs: random
routing, a wait that notices a kernel that hangs, and a lock of the GPU.
"""

from __future__ import annotations

import errno
import socket
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from vllm_spark.errors import SparkError

SKEW = 0.6
"""Exponent of the experts' popularity, rank ** -SKEW: a fifth of 128 experts gets about half of the tokens."""

MAX_KERNEL_SECONDS = 30.0
"""Seconds after which a kernel counts as hung; its calls take less than a thousandth of that."""

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Times(Generic[Name]):
    """Microseconds of one call, by candidate and round."""

    rounds: Mapping[Name, list[float]]

    def median(self, name: Name) -> float:
        """Over all rounds, microseconds."""
        return statistics.median(self.rounds[name])

    def ratio(self, name: Name, peer: Name) -> float:
        """Time of `name` over that of `peer`: the median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.rounds[name], self.rounds[peer], strict=True))


def time_in_turns(candidates: Mapping[Name, Callable[[], None]], calls: int, rounds: int) -> Times[Name]:
    """Captures each candidate into a graph, and replays the graphs in turns.

    Args:
        candidates: each makes `calls` calls of its kernel on the current stream, and keeps no allocation.
        calls: in one graph.
        rounds: timed replays of each candidate, after two untimed ones.

    Raises:
        HangError: a kernel hangs.
    """
    graphs = {name: _captured(name, body) for name, body in candidates.items()}
    times: dict[Name, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 2):
        events = []
        # The order alternates, so that a candidate does not always follow the same one.
        for name in list(graphs)[:: 1 if number % 2 else -1]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graphs[name].replay()
            end.record()
            events.append((name, begin, end))
        _wait_for((name, end) for name, _, end in events)  # the first that is missing belongs to the kernel that hangs
        if number >= 2:
            for name, begin, end in events:
                times[name].append(begin.elapsed_time(end) * 1000 / calls)
    return Times(times)


def _captured(name: Hashable, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Makes the calls once to load the kernels, then captures them into a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        body()
        wait_for_kernels(name)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


class HangError(SparkError):
    """A kernel hangs. From here on this process must neither wait for the GPU nor free memory on it.

    Args:
        parameters: of the call.
    """

    def __init__(self, parameters: Hashable) -> None:
        super().__init__(f"a kernel did not end within {MAX_KERNEL_SECONDS:g} s, with {parameters!r}")
        self.parameters = parameters


def wait_for_kernels(parameters: Hashable) -> None:
    """Waits until the current stream is idle.

    Ctrl-C is raised only after that: the exit of the process frees memory on the GPU.

    Args:
        parameters: of the kernels, for the error.

    Raises:
        HangError: it takes longer than `MAX_KERNEL_SECONDS`.
        RuntimeError: one of them failed.
    """
    done = torch.cuda.Event()
    done.record()
    _wait_for([(parameters, done)])


def _wait_for(ends: Iterable[tuple[Hashable, torch.cuda.Event]]) -> None:
    """Waits for events on a stream, each for at most `MAX_KERNEL_SECONDS` after the previous one.

    Args:
        ends: the events in their order on the stream, each with the parameters of its kernels.

    Raises:
        HangError, RuntimeError: as in `wait_for_kernels`.
    """
    stopped: BaseException | None = None
    for parameters, end in ends:
        deadline = time.monotonic() + MAX_KERNEL_SECONDS
        while not end.query():
            if time.monotonic() > deadline:
                raise HangError(parameters)
            try:
                time.sleep(0.001)
            except (KeyboardInterrupt, SystemExit) as signal:
                stopped = signal
    if stopped is not None:
        raise stopped


def route(rows: int, experts: int, top_k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random choices of `rows` tokens, on the CPU: the same for the same seed on every machine.

    Returns:
        Weights [rows, top_k] float32 that sum to one for each token, and distinct experts [rows, top_k] int32.
    """
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.arange(1, experts + 1, dtype=torch.float64) ** -SKEW
    popularity = popularity[torch.randperm(experts, generator=generator)]
    chosen = torch.multinomial(popularity.expand(rows, -1), top_k, replacement=False, generator=generator)
    weights = torch.rand(rows, top_k, generator=generator).softmax(dim=-1)
    return weights.float(), chosen.int()


@contextmanager
def lock_gpu(gpu: str) -> Iterator[None]:
    """Locks a GPU against other tuners on this machine, of any user.

    The lock is an abstract Unix socket, which the kernel removes with its process. Containers with separate network
    namespaces have separate locks.

    Args:
        gpu: its UUID.

    Raises:
        SparkError: another process holds the lock.
    """
    with closing(socket.socket(socket.AF_UNIX)) as name:
        try:
            name.bind(f"\0vllm-spark tune {gpu}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise SparkError(f"the GPU {gpu} cannot be locked ({error.strerror})") from None
            raise SparkError(
                f"another vllm-spark tune is running on this GPU ({gpu}), which would distort both measurements; wait "
                "for it, or stop it"
            ) from None
        yield
