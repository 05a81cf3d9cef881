"""Searches the fastest rows of a FusedMoE table for decode steps.

vLLM's space of 1920 rows is reduced to some dozens:

- In a decode step of up to 8 tokens an expert has at most 8 rows. `BLOCK_SIZE_M` is 16, the minimum of tensor cores;
  32 helps only from 17 tokens on.
- `GROUP_SIZE_M` orders an expert's blocks of rows; there is only one, so it is 1.
- Rows that do not fit into shared memory, do not compile in time, or spill registers are excluded (`trial`).
- fp8 in blocks: the kernel limits `BLOCK_SIZE_K` to the block, so larger values are duplicates.
- int4: a tile has 1, 2, 4 or 8 whole groups, as vLLM's kernels require, and a column has whole tiles, since the kernel
  does not check for the end of the weights.
- A tile wider than both matrices is excluded.
- Rows that were far from the fastest for another number of tokens are excluded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager
from functools import partial

from vllm_spark.errors import SparkError
from vllm_spark.kernels.devices import Device
from vllm_spark.kernels.fused_moe.check import shared_bytes
from vllm_spark.kernels.fused_moe.shapes import INT4_GROUPS_IN_TILE, FusedMoeExperts, FusedMoeParameters
from vllm_spark.tune.fused_moe.problem import ExpertsWeights, FusedMoeProblem, expert_bytes, layer_bytes, random_weights
from vllm_spark.tune.fused_moe.trial import Trials
from vllm_spark.tune.results import FusedMoeOutcome
from vllm_spark.tune.search import CALLS, cold_layers, find, promising, runs

KERNEL = "vLLM's Triton kernel for experts"

PRUNE_RATIO_ELSEWHERE = 1.5
"""Rows that took longer than this times the fastest, for another number of tokens, are not tried."""

_SIZES_N = (32, 64, 128, 256)
_SIZES_K = (64, 128, 256)
_WARPS = (4, 8)
_STAGES = (2, 3, 4, 5)


def search_space(shape: FusedMoeExperts, rows: int, device: Device) -> list[FusedMoeParameters]:
    """Candidate rows for a step of `rows` tokens, before any of them is compiled."""
    return [
        each
        for size_m, size_n, size_k, warps, stages in itertools.product(
            (16,) if rows <= 16 else (16, 32), _SIZES_N, _SIZES_K, _WARPS, _STAGES
        )
        if _fits(
            shape,
            device,
            each := FusedMoeParameters(
                BLOCK_SIZE_M=size_m, BLOCK_SIZE_N=size_n, BLOCK_SIZE_K=size_k, num_warps=warps, num_stages=stages
            ),
        )
    ]


def _fits(shape: FusedMoeExperts, device: Device, row: FusedMoeParameters) -> bool:
    values = row.row()
    size_n, size_k = values["BLOCK_SIZE_N"], values["BLOCK_SIZE_K"]
    if size_n > max(shape.hidden, 2 * shape.intermediate) or size_k > max(shape.hidden, shape.intermediate):
        return False
    if shape.block_shape is not None and (size_k > min(shape.block_shape) or shape.block_shape[1] % size_k):
        return False
    if shape.is_int4:
        groups, rest = divmod(size_k, shape.group_size)
        if rest or groups not in INT4_GROUPS_IN_TILE or shape.hidden % size_k or shape.intermediate % size_k:
            return False
    needed = shared_bytes(shape.table, values)
    return needed is None or needed <= device.shared_bytes


def weights_of(
    shape: FusedMoeExperts, on_note: Callable[[str], None] = lambda sentence: None
) -> AbstractContextManager[list[ExpertsWeights]]:
    """Random weights of enough layers to keep caches cold; a context manager that frees them.

    Args:
        on_note: see `search.cold_layers`.

    Raises:
        SparkError: the GPU has no room for two layers.
    """
    touched = shape.top_k * expert_bytes(shape)
    return cold_layers(partial(random_weights, shape), layer_bytes(shape), touched, shape.describe(), on_note)


def search(
    shape: FusedMoeExperts,
    rows: int,
    layers: list[ExpertsWeights],
    device: Device,
    trials: Trials,
    known: Sequence[FusedMoeOutcome] = (),
    rounds: int = 20,
    on_trial: Callable[[], None] = lambda: None,
    hung: Container[object] = (),
) -> FusedMoeOutcome:
    """Measures the candidates in turns with the default, and confirms the fastest with other routings.

    Args:
        rows: tokens of the decode step, 1 to 8.
        layers: see `weights_of`.
        device: this machine's GPU.
        trials: trial compilations for that GPU.
        known: outcomes of the same shape for other numbers of tokens.
        rounds: see `search.find`.
        on_trial: called for every compiled row.
        hung: parameters with which a kernel hung before; they are not tried.

    Raises:
        HangError: a kernel hangs.
        SparkError: vLLM's own choice does not run, or a kernel failed.
    """
    problem, others = (FusedMoeProblem(shape, layers, rows, CALLS, rows + more, device.name) for more in (0, 100))
    if not runs(problem, None, KERNEL):
        raise SparkError(f"{KERNEL} does not run with vLLM's own parameters for {rows} tokens and {shape.describe()}")
    candidates = without_slow([row for row in search_space(shape, rows, device) if row not in hung], known)
    candidates = [
        each for each in trials.usable(shape.table, candidates, on_trial, shape.int4) if runs(problem, each, KERNEL)
    ]
    found = find(problem, others, None, candidates, rounds)
    return FusedMoeOutcome(
        shape=shape,
        rows=rows,
        parameters=found.parameters,
        default_us=found.default_us,
        tuned_us=found.tuned_us,
        ratio=found.ratio,
        tried=[(row, ratio) for row, ratio in found.tried.items() if row is not None],
    )


def without_slow(space: Sequence[FusedMoeParameters], known: Sequence[FusedMoeOutcome]) -> list[FusedMoeParameters]:
    """The rows of `space` that were near the fastest in every outcome that has them."""
    out: set[FusedMoeParameters] = set()
    for outcome in known:
        ratios = dict(outcome.tried)
        near = promising(ratios, PRUNE_RATIO_ELSEWHERE)
        out.update(row for row in ratios if row not in near)
    return [row for row in space if row not in out]
