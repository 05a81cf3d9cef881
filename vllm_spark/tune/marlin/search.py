"""Searches Marlin's fastest parameters for the experts' GEMMs of a decode step: the whole space, which is small."""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import AbstractContextManager
from functools import partial

from vllm_spark.kernels.devices import Device
from vllm_spark.kernels.marlin.rules import MAXIMUM_BLOCKS_PER_SM, SMALL_TILES, Gemm, blocks_fault
from vllm_spark.kernels.marlin.table import MarlinParameters, MarlinShape
from vllm_spark.tune.marlin.problem import MarlinProblem, Weights, expert_bytes, random_weights
from vllm_spark.tune.results import BLOCK_SIZE_M, MARLIN_DEFAULT, MarlinOutcome
from vllm_spark.tune.search import CALLS, cold_layers, find, runs


def search_space(shape: MarlinShape, device: Device) -> list[MarlinParameters]:
    """Every compiled tile that divides the matrix, with every number of blocks that can be resident together."""
    gemm = Gemm(True, shape.size_n, shape.size_k, shape.group_size, shape.quant_type, BLOCK_SIZE_M)
    return [
        MarlinParameters(
            thread_k=tile.thread_k, thread_n=tile.thread_n, blocks_per_sm=blocks, block_size_m=BLOCK_SIZE_M
        )
        for tile in SMALL_TILES
        for blocks in range(1, MAXIMUM_BLOCKS_PER_SM + 1)
        if blocks_fault(blocks, tile, gemm, device) is None
    ]


def weights_of(
    shape: MarlinShape, on_note: Callable[[str], None] = lambda sentence: None
) -> AbstractContextManager[list[Weights]]:
    """Random weights of enough layers to keep caches cold; a context manager that frees them.

    Args:
        on_note: see `search.cold_layers`.

    Raises:
        SparkError: the GPU has no room for two layers.
    """
    return cold_layers(
        partial(random_weights, shape),
        shape.experts * expert_bytes(shape),
        shape.top_k * expert_bytes(shape),
        f"{shape.kernel} with {shape.experts} experts of {shape.size_n} x {shape.size_k}",
        on_note,
    )


def search(
    shape: MarlinShape,
    rows: int,
    layers: list[Weights],
    device: Device,
    rounds: int = 30,
    hung: Container[object] = (),
) -> MarlinOutcome:
    """Measures all candidates in turns with the default, and confirms the fastest with other routings.

    Args:
        rows: tokens of the decode step, 1 to 8.
        layers: see `weights_of`.
        device: this machine's GPU.
        rounds: see `search.find`.
        hung: parameters with which a kernel hung before; they are not tried.

    Raises:
        HangError: a kernel hangs.
        SparkError: a kernel failed.
    """
    problem, others = (MarlinProblem(shape, layers, rows, CALLS, seed=rows + more) for more in (0, 100))
    space = (each for each in search_space(shape, device) if each not in hung)
    candidates = [each for each in space if runs(problem, each, "Marlin")]
    found = find(problem, others, MARLIN_DEFAULT, candidates, rounds)
    return MarlinOutcome(
        shape=shape,
        rows=rows,
        parameters=found.parameters,
        default_us=found.default_us,
        tuned_us=found.tuned_us,
        ratio=found.ratio,
        tried=list(found.tried.items()),
    )
