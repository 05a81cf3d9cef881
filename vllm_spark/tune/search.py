"""How the search for a kernel's parameters decides, whichever kernel it is.

A winner has to win twice: in the search, and against the default alone with other routings. All else is left to vLLM's
own choice, so that no entry is slower than none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch

from vllm_spark.errors import SparkError
from vllm_spark.tune.timing import HangError, Times, time_in_turns, wait_for_kernels

MIN_GAIN = 0.02
"""Share of the default's time that parameters must save to get an entry."""

CALLS = 48
"""Calls of a kernel in one graph: those of a model with 48 layers."""

PRUNE_RATIO = 1.25
"""Candidates that take longer than this times the fastest in `_FEW_ROUNDS` rounds are not measured further."""

CACHE_FLUSH_FACTOR = 3
"""Multiples of the L2 cache that are read before a layer's weights are used again."""

_FEW_ROUNDS = 4
_PRUNE_ABOVE = 16  # candidates; with fewer, all are measured in all rounds

Parameters = TypeVar("Parameters", bound=Hashable)
Contravariant = TypeVar("Contravariant", contravariant=True)
Weights = TypeVar("Weights")


class Problem(Protocol[Contravariant]):
    """Calls of a kernel that are ready to be made with any parameters."""

    def run(self, parameters: Contravariant) -> None:
        """All of them, enqueued on the current stream."""

    def call(self, call: int, parameters: Contravariant) -> torch.Tensor:
        """One of them."""


@dataclass(frozen=True)
class Found(Generic[Parameters]):
    """The winner, and the times that made it so; attributes as in `outcome`."""

    parameters: Parameters
    default_us: float
    tuned_us: float
    ratio: float
    tried: dict[Parameters, float]


@contextmanager
def cold_layers(
    make: Callable[[int], Weights],
    layer_bytes: int,
    touched_bytes: int,
    what: str,
    on_note: Callable[[str], None] = lambda sentence: None,
) -> Iterator[list[Weights]]:
    """Random weights of as many layers as keep caches cold; their memory is given back at the end.

    Args:
        make: those of one layer, from a seed.
        layer_bytes: of one layer.
        touched_bytes: that one call of the kernel reads, at the least.
        what: the weights are of, for the error.
        on_note: called with a sentence if there is room for fewer than that.

    Raises:
        SparkError: the GPU has no room for two layers.
    """
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    layers = min(CALLS, max(2, -(-CACHE_FLUSH_FACTOR * cache // touched_bytes)))
    free, _ = torch.cuda.mem_get_info()
    room = int(free * 0.8) // layer_bytes
    if room < 2:
        raise SparkError(
            f"the GPU has {free / 2**30:.1f} GiB free, and {what} needs {2 * layer_bytes / 0.8 / 2**30:.1f} GiB; "
            "end what else uses the GPU"
        )
    if room < layers:
        on_note(
            f"The GPU has room for {room} of {layers} layers of {what}: its cache may hold weights that a decode step "
            "finds in memory, so these times are less certain; end what else uses the GPU."
        )
    weights = [make(seed) for seed in range(min(layers, room))]
    try:
        yield weights
    finally:
        if not isinstance(sys.exc_info()[1], HangError):  # the GPU frees nothing while a kernel runs
            weights.clear()
            torch.cuda.empty_cache()


def find(
    problem: Problem[Parameters],
    others: Problem[Parameters],
    default: Parameters,
    candidates: Sequence[Parameters],
    rounds: int,
) -> Found[Parameters]:
    """Tries all candidates in turns with the default, then the fastest once more.

    Args:
        problem: of the search.
        others: the same with other routings, for the confirmation.
        default: vLLM's own choice.
        candidates: all run (see `runs`).
        rounds: timed replays of each candidate in the search; twice as many in the confirmation.

    Raises:
        HangError: a kernel does not end.
        SparkError: a kernel failed, or the GPU is full.
    """
    tried: dict[Parameters, float] = {}
    if len(candidates) > _PRUNE_ABOVE:
        tried = _ratios(_measure(problem, [default, *candidates], _FEW_ROUNDS), candidates, default)
        candidates = promising(tried, PRUNE_RATIO)
    tried |= _ratios(_measure(problem, [default, *candidates], rounds), candidates, default)
    best = min(candidates, key=tried.__getitem__, default=default)
    times = _measure(others, list(dict.fromkeys((default, best))), 2 * rounds)
    if max(tried.get(best, 1.0), times.ratio(best, default)) > 1 - MIN_GAIN:
        best = default
    return Found(best, times.median(default), times.median(best), times.ratio(best, default), tried)


def promising(ratios: dict[Parameters, float], limit: float) -> list[Parameters]:
    """Those that take less than `limit` times as long as the fastest."""
    fastest = min(ratios.values(), default=0.0)
    return [each for each, ratio in ratios.items() if ratio <= limit * fastest]


def runs(problem: Problem[Parameters], parameters: Parameters, kernel: str) -> bool:
    """Whether the kernel takes them; one that refuses leaves the GPU as it was.

    Raises:
        HangError: the kernel does not end.
        SparkError: the GPU itself failed, or is full.
    """
    try:
        problem.call(0, parameters)
        wait_for_kernels(parameters)
    except HangError:
        raise
    except torch.cuda.OutOfMemoryError:
        raise SparkError(f"the GPU has no memory left for {kernel}; end what else uses it") from None
    except Exception as error:  # Triton, vLLM and torch each raise their own
        try:
            wait_for_kernels(parameters)
        except RuntimeError:
            raise SparkError(f"{kernel} failed with {parameters!r}: {_first_line(error)}") from None
        return False
    return True


def _measure(problem: Problem[Parameters], candidates: Sequence[Parameters], rounds: int) -> Times[Parameters]:
    try:
        return time_in_turns({each: partial(problem.run, each) for each in candidates}, CALLS, rounds)
    except HangError:
        raise
    except torch.cuda.OutOfMemoryError:
        raise SparkError("the GPU has no memory left for the search; end what else uses it") from None
    except Exception as error:  # as in `runs`
        raise SparkError(f"a kernel failed that ran before, with another routing: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _ratios(times: Times[Parameters], candidates: Sequence[Parameters], default: Parameters) -> dict[Parameters, float]:
    return {each: times.ratio(each, default) for each in candidates}
