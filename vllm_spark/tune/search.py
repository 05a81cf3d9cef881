"""The search for a kernel's parameters, the same for every kernel.

Parameters must be faster than the default twice: in the search, and in a confirmation with other routings. Otherwise
the entry is vLLM's own choice, so that a table never makes a step slower.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch

from vllm_spark.errors import SparkError, first_line
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
    """Prepared calls of a kernel that can be made with any parameters."""

    def run(self, parameters: Contravariant) -> None:
        """Enqueues all calls on the current stream."""

    def call(self, call: int, parameters: Contravariant) -> torch.Tensor:
        """Enqueues one call."""


@dataclass(frozen=True)
class Found(Generic[Parameters]):
    """The winner and its times; attributes as in `results`."""

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
    """Random weights of enough layers to keep caches cold; a context manager that frees them.

    Args:
        make: those of one layer, from a seed.
        layer_bytes: of one layer.
        touched_bytes: minimum that one call of the kernel reads.
        what: description of the layers, for messages.
        on_note: called with a sentence if the GPU's memory holds only fewer layers.

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
            "stop other programs on the GPU"
        )
    if room < layers:
        on_note(
            f"The GPU has room for only {room} of {layers} layers of {what}: weights may be in its cache, which they "
            "are not in a decode step, so the times are less reliable; stop other programs on the GPU."
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
    """Measures all candidates in turns with the default, and then confirms the fastest.

    Args:
        problem: of the search.
        others: the same with other routings, for the confirmation.
        default: vLLM's own choice.
        candidates: parameters that the kernel accepts (see `runs`).
        rounds: timed replays of each candidate in the search; twice as many in the confirmation.

    Raises:
        HangError: a kernel hangs.
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
    """The candidates that take at most `limit` times as long as the fastest."""
    fastest = min(ratios.values(), default=0.0)
    return [each for each, ratio in ratios.items() if ratio <= limit * fastest]


def runs(problem: Problem[Parameters], parameters: Parameters, kernel: str) -> bool:
    """Whether the kernel accepts the parameters; one that refuses them leaves the GPU usable.

    Raises:
        HangError: the kernel hangs.
        SparkError: the GPU failed, or its memory is full.
    """
    try:
        problem.call(0, parameters)
        wait_for_kernels(parameters)
    except HangError:
        raise
    except torch.cuda.OutOfMemoryError:
        raise SparkError(f"the GPU has no memory left for {kernel}; stop other programs on it") from None
    except Exception as error:  # Triton, vLLM and torch each raise their own
        try:
            wait_for_kernels(parameters)
        except RuntimeError:
            raise SparkError(f"{kernel} failed with {parameters!r}: {first_line(error)}") from None
        return False
    return True


def _measure(problem: Problem[Parameters], candidates: Sequence[Parameters], rounds: int) -> Times[Parameters]:
    try:
        return time_in_turns({each: partial(problem.run, each) for each in candidates}, CALLS, rounds)
    except HangError:
        raise
    except torch.cuda.OutOfMemoryError:
        raise SparkError("the GPU has no memory left for the search; stop other programs on it") from None
    except Exception as error:  # as in `runs`
        raise SparkError(f"a kernel failed while it was timed, not in its first call: {first_line(error)}") from None


def _ratios(times: Times[Parameters], candidates: Sequence[Parameters], default: Parameters) -> dict[Parameters, float]:
    return {each: times.ratio(each, default) for each in candidates}
