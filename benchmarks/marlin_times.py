"""A model of the time of Marlin's kernel for experts in a decode step, for each tile and number of blocks.

The kernel divides all slices (`thread_k` rows of a column that is one tile wide) evenly among its blocks. A block's
stripe of slices may end within a column, and the blocks that share a column add their sums one after the other. A block
loads `STAGES - 1` slices ahead of the one that it multiplies. So the model has five constants of a GPU: a start, the
memory's bandwidth, its latency, the beginning of a column, and the handing over of a sum. `fit` determines them from
times, and `predict` gives the time of a candidate.

It is not part of the product: its constants for a GB10 are not known, and it has not been confirmed on another GPU yet
(benchmarks/marlin_model.py compares it with measurements).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from vllm_spark.kernels.marlin.rules import QUANTIZATIONS, STAGES, Tile
from vllm_spark.kernels.marlin.table import MarlinParameters, MarlinShape

_BANDWIDTHS = tuple(100 * 1.06**step for step in range(66))
"""GB/s, 100 to 4400: those that `fit` tries."""

_LATENCIES = tuple(300 * 1.12**step for step in range(20))
"""Nanoseconds, 300 to 2600."""


class Constants(BaseModel):
    """Of one GPU model.

    Attributes:
        start_us: of the kernel, and what each block does once.
        bandwidth: of the memory, GB/s, with loads as large as the kernel's.
        latency_ns: from a load to its data, with other loads under way.
        column_us: the beginning and the end of a block's part of a column: filling the pipeline, writing the output.
        sum_us: of a sum that a block takes over from another.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    start_us: float = Field(ge=0)
    bandwidth: float = Field(gt=0)
    latency_ns: float = Field(gt=0)
    column_us: float = Field(ge=0)
    sum_us: float = Field(ge=0)


@dataclass(frozen=True)
class Partition:
    """How a kernel's work is divided.

    Attributes:
        blocks: that have work.
        slices: of the longest block.
        pieces: parts of columns that it has.
        sharers: blocks of the column that most share.
        slice_bytes: of weights and scales that a slice reads.
    """

    blocks: int
    slices: int
    pieces: int
    sharers: int
    slice_bytes: float


def partition(shape: MarlinShape, active: float, parameters: MarlinParameters, multiprocessors: int) -> Partition:
    """The division of a step's work among the blocks.

    Args:
        shape: of the GEMM.
        active: experts that have a token, on average over steps.
        parameters: an explicit tile.
        multiprocessors: of the GPU.
    """
    tile = Tile.requested(parameters.thread_k, parameters.thread_n)
    grid = parameters.blocks * multiprocessors
    depth = shape.size_k // tile.thread_k
    total = active * (shape.size_n // tile.thread_n) * depth
    slices = max(1, math.ceil(total / grid))
    if shape.group_size > tile.thread_k:  # a stripe has whole groups
        groups = shape.group_size // tile.thread_k
        slices = groups * math.ceil(slices / groups)
    blocks = min(grid, math.ceil(total / slices))
    starts = range(0, blocks * slices, slices)
    pieces = max((start + slices - 1) // depth - start // depth + 1 for start in starts)
    sharers = max(1, math.ceil(depth / slices) + (1 if depth % slices and slices % depth else 0))
    quantization = QUANTIZATIONS[shape.quant_type]
    group = shape.size_k if shape.group_size == -1 else shape.group_size
    weights = tile.thread_k * tile.thread_n * quantization.bits / 8
    return Partition(blocks, slices, pieces, sharers, weights + 2 * tile.thread_n * tile.thread_k / group)


def predict(
    shape: MarlinShape, active: float, parameters: MarlinParameters, multiprocessors: int, constants: Constants
) -> float:
    """Microseconds of one call; arguments as for `partition`."""
    work = partition(shape, active, parameters, multiprocessors)
    return constants.start_us + _load_us(work, constants.bandwidth, constants.latency_ns) + _rest_us(work, constants)


@dataclass(frozen=True)
class Measured:
    """A measured time.

    Attributes:
        shape: of the GEMM.
        active: as for `partition`.
        parameters: an explicit tile.
        microseconds: of one call.
    """

    shape: MarlinShape
    active: float
    parameters: MarlinParameters
    microseconds: float


def fit(times: Sequence[Measured], multiprocessors: int) -> Constants:
    """The constants with the smallest squared relative errors.

    Raises:
        ValueError: there are fewer times than constants.
    """
    import numpy

    if len(times) < len(Constants.model_fields):
        raise ValueError(f"{len(times)} times are too few for {len(Constants.model_fields)} constants")
    work = [partition(each.shape, each.active, each.parameters, multiprocessors) for each in times]
    measured = numpy.array([each.microseconds for each in times])
    features = numpy.array([[1.0, each.pieces, each.sharers - 1] for each in work]) / measured[:, None]
    best: tuple[float, Constants] | None = None
    for bandwidth in _BANDWIDTHS:
        for latency in _LATENCIES:
            loads = numpy.array([_load_us(each, bandwidth, latency) for each in work])
            rest = _nonnegative(features, 1 - loads / measured)
            error = float(((features @ rest - 1 + loads / measured) ** 2).sum())
            if best is None or error < best[0]:
                start, column, total = (float(value) for value in rest)
                best = (
                    error,
                    Constants(start_us=start, bandwidth=bandwidth, latency_ns=latency, column_us=column, sum_us=total),
                )
    assert best is not None
    return best[1]


def _load_us(work: Partition, bandwidth: float, latency_ns: float) -> float:
    """The longest block's loads: at its share of the bandwidth, or as fast as its slices under way arrive."""
    shared = work.slice_bytes * work.blocks / bandwidth / 1e3
    alone = latency_ns / 1e3 / (STAGES - 1)
    return work.slices * max(shared, alone)


def _rest_us(work: Partition, constants: Constants) -> float:
    return work.pieces * constants.column_us + (work.sharers - 1) * constants.sum_us


def _nonnegative(features: Any, target: Any) -> Any:
    """Least squares with weights of zero or more: the best of all subsets of the three features."""
    import numpy

    best = numpy.zeros(features.shape[1])
    smallest = float((target**2).sum())
    for count in range(1, features.shape[1] + 1):
        for chosen in itertools.combinations(range(features.shape[1]), count):
            found, *_ = numpy.linalg.lstsq(features[:, chosen], target, rcond=None)
            error = float(((features[:, chosen] @ found - target) ** 2).sum())
            if (found >= 0).all() and error < smallest:
                smallest = error
                best = numpy.zeros(features.shape[1])
                best[list(chosen)] = found
    return best


@dataclass(frozen=True)
class Agreement:
    """The model beside measurements of every candidate for one shape and number of rows.

    Attributes:
        shape: of the GEMM.
        rows: tokens of the step.
        first: the model's first choice.
        excess: time of the first choice over the best measured one, minus 1.
        against_default: time of the first choice over vLLM's default, minus 1.
    """

    shape: MarlinShape
    rows: int
    first: MarlinParameters
    excess: float
    against_default: float


def agreement(
    shape: MarlinShape,
    rows: int,
    active: float,
    ratios: Mapping[MarlinParameters, float],
    multiprocessors: int,
    constants: Constants,
) -> Agreement:
    """The model's first choice beside the measured ones.

    Args:
        ratios: measured time of each candidate over that of vLLM's default.
    """
    first = min(ratios, key=lambda each: predict(shape, active, each, multiprocessors, constants))
    return Agreement(shape, rows, first, ratios[first] / min(ratios.values()) - 1, ratios[first] - 1)
