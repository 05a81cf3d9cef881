"""Times of kernels as a decode step runs them: in a CUDA graph, one after the other, with weights that no cache holds.

Candidates take turns within each round, and only ratios within a round are compared: clocks and other users of the
machine drift by more than two kernels differ.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

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
    """Captures each candidate into a graph, and replays them in turns.

    Args:
        candidates: each makes `calls` calls of its kernel on the current stream, and allocates nothing that it keeps.
        calls: in one graph.
        rounds: replays of each candidate that are timed, after two that are not.
    """
    graphs = {name: _captured(body) for name, body in candidates.items()}
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
        torch.cuda.synchronize()
        if number >= 2:
            for name, begin, end in events:
                times[name].append(begin.elapsed_time(end) * 1000 / calls)
    return Times(times)


def _captured(body: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The calls once outside (kernels are loaded at their first use), then in a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph
