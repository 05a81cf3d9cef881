"""The model of Marlin's times: it divides work as the kernel does, and its constants come back from times."""

from __future__ import annotations

import random

import pytest

from benchmarks.marlin_times import Constants, Measured, agreement, fit, partition, predict
from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.marlin.table import MarlinParameters
from vllm_spark.tune.marlin.search import search_space

from .tuning_outcomes import W13

W2 = W13.model_copy(update={"kernel": "moe_w2", "size_n": 2048, "size_k": 384})
CONSTANTS = Constants(start_us=3.0, bandwidth=240.0, latency_ns=800.0, column_us=0.6, sum_us=0.9)
SHAPES = (W13, W2, W13.model_copy(update={"size_n": 1536}), W2.model_copy(update={"size_k": 768}))
ACTIVE = {1: 8.0, 2: 15.0, 4: 27.0, 8: 47.0}


def tile(thread_k: int, thread_n: int, blocks: int) -> MarlinParameters:
    return MarlinParameters(thread_k=thread_k, thread_n=thread_n, blocks_per_sm=blocks, block_size_m=8)


def test_a_block_for_each_column() -> None:
    """One token's gate and up on a GB10: 8 experts times 6 columns of 128 are its 48 multiprocessors."""
    work = partition(W13, 8, tile(128, 128, 1), 48)
    assert (work.blocks, work.slices, work.pieces, work.sharers) == (48, 16, 1, 1)
    assert work.slice_bytes == 128 * 128 / 2 + 2 * 128


def test_columns_that_blocks_share() -> None:
    """Three blocks of 64 x 128 for each multiprocessor: 32 slices of a column, in stripes of 11, so of 12."""
    work = partition(W13, 8, tile(64, 128, 3), 48)
    assert work.slices == 12, "a group of 128 has two slices"
    assert (work.blocks, work.sharers, work.pieces) == (128, 4, 2)


def test_more_loads_under_way_are_faster_until_the_memory_is_full() -> None:
    slow = CONSTANTS.model_copy(update={"column_us": 0.0, "sum_us": 0.0, "latency_ns": 6000.0})
    one, two = (predict(W13, 47, tile(128, 64, blocks), 48, slow) for blocks in (1, 2))
    assert two < one
    narrow = slow.model_copy(update={"bandwidth": 50.0})
    assert predict(W13, 47, tile(128, 64, 2), 48, narrow) == pytest.approx(
        predict(W13, 47, tile(128, 64, 1), 48, narrow), rel=0.03
    )


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_constants_come_back_from_times(noise: float) -> None:
    """Times of two shapes predict those of two others, and their fastest candidates."""
    draw = random.Random(1)
    times = [
        Measured(shape, active, each, predict(shape, active, each, 48, CONSTANTS) * draw.gauss(1, noise))
        for shape in SHAPES[:2]
        for active in ACTIVE.values()
        for each in search_space(shape, GB10)
    ]
    found = fit(times, 48)
    for shape in SHAPES[2:]:
        for active in ACTIVE.values():
            true = {each: predict(shape, active, each, 48, CONSTANTS) for each in search_space(shape, GB10)}
            predicted = {each: predict(shape, active, each, 48, found) for each in true}
            assert predicted == pytest.approx(true, rel=0.06)
            first = min(predicted, key=predicted.__getitem__)
            assert true[first] <= 1.03 * min(true.values())


def test_agreement_with_measurements() -> None:
    candidates = search_space(W13, GB10)
    ratios = {each: predict(W13, 8, each, 48, CONSTANTS) / 20 for each in candidates}
    same = agreement(W13, 1, 8, ratios, 48, CONSTANTS)
    assert same.excess == 0
    assert same.against_default == pytest.approx(min(ratios.values()) - 1)
    other = agreement(W13, 1, 8, ratios | {same.first: 2.0}, 48, CONSTANTS)
    assert other.first == same.first
    assert other.against_default == 1.0
    assert other.excess > 0


def test_too_few_times() -> None:
    with pytest.raises(ValueError, match="4 times are too few for 5 constants"):
        fit([Measured(W13, 8, tile(128, 128, 1), 10.0)] * 4, 48)
