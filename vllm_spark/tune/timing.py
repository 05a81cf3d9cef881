"""Times of kernels as a decode step runs them: in a CUDA graph, one after the other, with weights that no cache holds.

Candidates take turns within each round, and only ratios within a round are compared: clocks and other users of the
machine drift by more than two kernels differ.
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
"""Exponent of the experts' popularity, rank ** -SKEW: half of the tokens go to about a fifth of 128 experts."""


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


MAX_KERNEL_SECONDS = 30.0
"""Seconds that some calls of a kernel may take: thousands of times what they do, so that kernel will never end."""

Name = TypeVar("Name", bound=Hashable)


class HangError(SparkError):
    """A kernel that does not end. From here on this process must not wait for the GPU, nor free memory on it.

    Args:
        parameters: that it was called with.
    """

    def __init__(self, parameters: Hashable) -> None:
        super().__init__(f"a kernel did not end within {MAX_KERNEL_SECONDS:g} s, with {parameters!r}")
        self.parameters = parameters


def wait_for_kernels(parameters: Hashable) -> None:
    """Returns when all that is enqueued on the current stream is done.

    Ctrl-C counts once it is: on its way out, the process frees memory on the GPU.

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
    """Returns when the stream has come to every one of `ends`, each within `MAX_KERNEL_SECONDS` of the one before.

    Args:
        ends: in their order on the stream, each with what its kernels were called with. Errors as `wait_for_kernels`'.
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
    """Captures each candidate into a graph, and replays them in turns.

    Args:
        candidates: each makes `calls` calls of its kernel on the current stream, and allocates nothing that it keeps.
        calls: in one graph.
        rounds: replays of each candidate that are timed, after two that are not.

    Raises:
        HangError: the kernel of one does not end.
    """
    graphs = {name: _captured(name, body) for name, body in candidates.items()}
    times: dict[Name, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 2):
        events = []
        # Every other round the other way round: what follows a fast kernel must not always be the same.
        for name in list(graphs)[:: 1 if number % 2 else -1]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graphs[name].replay()
            end.record()
            events.append((name, begin, end))
        _wait_for((name, end) for name, _, end in events)  # the first that does not come names what hangs
        if number >= 2:
            for name, begin, end in events:
                times[name].append(begin.elapsed_time(end) * 1000 / calls)
    return Times(times)


def _captured(name: Hashable, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The calls once outside (kernels are loaded at their first use), then in a graph."""
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


@contextmanager
def lock_gpu(gpu: str) -> Iterator[None]:
    """While inside, no other process gets in with the same `gpu`, whoever runs it.

    The claim is a name in the kernel (an abstract socket), so it is gone with its process, however that ends.
    Containers with networks of their own have such names of their own, and do not see each other.

    Args:
        gpu: what names this GPU and no other: its UUID.

    Raises:
        SparkError: another process has it.
    """
    with closing(socket.socket(socket.AF_UNIX)) as name:
        try:
            name.bind(f"\0vllm-spark tune {gpu}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise SparkError(f"the GPU {gpu} cannot be claimed ({error.strerror})") from None
            raise SparkError(
                f"another vllm-spark tune is at work on this GPU ({gpu}), and two would measure each other; wait for "
                "its end, or end it"
            ) from None
        yield
