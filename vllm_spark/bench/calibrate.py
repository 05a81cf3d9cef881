"""Finds the launch shapes and the packets' limit that make collectives fastest on this machine's GPU.

Parameters are searched one after the other, each with the best values of those before it: they hardly depend on each
other, and all combinations would take hours. A time is the geometric mean of the medians over the sizes that the
parameter affects, in a CUDA graph of 97 calls. Pairs of runtimes differ by several percent (by the placement of their
memory, and the cores of their proxies), so each value gets a new pair in each of several rounds, and the values take
turns. A value must be at least 3 % faster to replace a default.

If both ranks share one GPU, each rank has a running kernel, which waits for the other rank's, and a queued one, and a
block occupies a whole multiprocessor: with more blocks than fit for four kernels they would hang. In serving each rank
has its own GPU, so the number of blocks cannot be determined here: everything else is measured with as many as fit, and
their number stays unchanged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from vllm_spark.bench.gpu_ranks import GpuPair, graph_times
from vllm_spark.collective import RuntimeOptions
from vllm_spark.collective.cuda_runtime import default_shape
from vllm_spark.collective.launch_table import LaunchTable

KIB, MIB = 1 << 10, 1 << 20

PACKET_SIZES = (2 * KIB, 4 * KIB, 8 * KIB, 16 * KIB)
PAYLOAD_SIZES = (16 * KIB, 64 * KIB, 256 * KIB, MIB, 8 * MIB)
LIMITS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Candidates of the limit between LL packets and payload, in KiB."""

PACKET_CHOICES: dict[str, tuple[Any, ...]] = {
    "packet_threads": (288, 544, 160, 96),
    "dependent_launch": (True, False),
}
PAYLOAD_CHOICES: dict[str, tuple[Any, ...]] = {
    "payload_blocks": (32, 4, 8, 16, 48, 64),
    "payload_bytes_per_block": (4096, 1024, 2048, 8192, 16384),
    "payload_message_bytes": (128 * KIB, 64 * KIB, 256 * KIB, 512 * KIB, MIB),
    "payload_threads": (256, 128),
}
_MAX_WINNING_RATIO = 0.97  # of the best time so far, for a value to replace it


@dataclass(frozen=True)
class Trial:
    """One value of one parameter.

    Attributes:
        medians: microseconds, by size in bytes.
        mean: their geometric mean.
    """

    parameter: str
    value: Any
    medians: dict[int, float]

    @property
    def mean(self) -> float:
        """Microseconds."""
        return statistics.geometric_mean(self.medians.values())


def calibrate(
    gpu: str, options: RuntimeOptions, rounds: int, launches: int, on_trial: Callable[[Trial], None]
) -> LaunchTable:
    """Measures all parameters, and returns the best table.

    Args:
        gpu: its name, for the table.
        options: of both ranks; their `launch` is where the search starts.
        rounds: new pairs for each value.
        launches: samples of each size in a round.
        on_trial: called for each value that was tried.

    Raises:
        SparkError: a rank failed.
    """

    def best_of(parameter: str, choices: Sequence[Any], sizes: Sequence[int], start: RuntimeOptions) -> RuntimeOptions:
        shape = start.launch or default_shape(start)
        choices = sorted(choices, key=lambda value: value != getattr(shape, parameter))  # first what it replaces
        tried = [replace(start, launch=replace(shape, **{parameter: value})) for value in choices]
        best, fastest = start, float("inf")
        for value, candidate, medians in zip(choices, tried, _medians(tried, sizes, rounds, launches), strict=True):
            trial = Trial(parameter, value, medians)
            on_trial(trial)
            if trial.mean < fastest * _MAX_WINNING_RATIO:
                best, fastest = candidate, trial.mean
        return best

    most_blocks = _most_blocks()
    shared = shares_one_gpu()
    first_shape = options.launch or default_shape(options)
    packets = replace(options, packet_bytes=max(PACKET_SIZES), launch=first_shape)
    for parameter, choices in PACKET_CHOICES.items():
        packets = best_of(parameter, choices, PACKET_SIZES, packets)
    shape = packets.launch or first_shape
    shape = replace(shape, payload_blocks=min(shape.payload_blocks, most_blocks))
    payload = replace(packets, packet_bytes=0, launch=shape)
    for parameter, choices in PAYLOAD_CHOICES.items():
        if parameter == "payload_blocks":
            if shared:
                continue
            choices = tuple(value for value in choices if value <= most_blocks)
        payload = best_of(parameter, choices, PAYLOAD_SIZES, payload)
    ways = [replace(payload, packet_bytes=size) for size in (LIMITS[-1] * KIB, 0)]
    limits = [limit * KIB for limit in LIMITS]
    by_packets, by_payload = _medians(ways, limits, rounds, launches)
    on_trial(Trial("way", "packets", by_packets))
    on_trial(Trial("way", "payload", by_payload))
    shape = payload.launch or shape
    if shared:
        shape = replace(shape, payload_blocks=first_shape.payload_blocks)
    return LaunchTable(gpu, options.loopback_mode, best_limit(by_packets, by_payload) // KIB, shape)


def best_limit(by_packets: dict[int, float], by_payload: dict[int, float]) -> int:
    """The limit in bytes up to which packets are faster, from the times of both at the same ascending sizes.

    The one with the smallest product of times, 0 for no packets at all. So one size at which noise has turned the order
    does not decide.
    """
    ratios = [math.log(by_packets[size] / by_payload[size]) for size in by_packets]
    totals = dict(zip((0, *by_packets), accumulate(ratios, initial=0.0), strict=True))
    return min(totals, key=lambda limit: totals[limit])


def shares_one_gpu() -> bool:
    """True if both ranks run on the only GPU."""
    return int(torch.cuda.device_count()) == 1


def _most_blocks() -> int:
    """Largest number of blocks of one kernel with which all kernels are resident; see above."""
    multiprocessors = int(torch.cuda.get_device_properties(0).multi_processor_count)
    return min(64, multiprocessors // 4 if shares_one_gpu() else multiprocessors)


def rows_to_come() -> int:
    """Maximum number of trials that `calibrate` reports."""
    return sum(map(len, (*PACKET_CHOICES.values(), *PAYLOAD_CHOICES.values()))) + 2


def _medians(
    candidates: Sequence[RuntimeOptions], sizes: Sequence[int], rounds: int, launches: int
) -> list[dict[int, float]]:
    """For each candidate, the median over the rounds of a round's median, by size."""
    medians: list[dict[int, list[float]]] = [{size: [] for size in sizes} for _ in candidates]
    for _ in range(rounds):
        for options, by_size in zip(candidates, medians, strict=True):
            pair = GpuPair((options, options))
            try:
                for size, of_rounds in by_size.items():
                    of_rounds.append(statistics.median(graph_times(pair, "all_reduce", (size // 2,), launches)))
            finally:
                pair.close()
    return [{size: statistics.median(of_rounds) for size, of_rounds in by_size.items()} for by_size in medians]
