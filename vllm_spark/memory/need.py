"""The memory that a start needs on a machine, and the sentence that refuses one that does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from vllm_spark.memory.scopes import GIB, Scope, gib

Size = Annotated[int, Field(ge=0)]
"""Bytes."""

_GRAPHS, _ACTIVATIONS, _ACTIVATIONS_ON_CPU = GIB, GIB, GIB // 4
"""Estimates in bytes, for the sum alone: vLLM measures both after it has loaded the model. What it measures differs
with the model and with the largest batch."""


def graphs_and_activations(*, gpu: bool, eager: bool = False) -> int:
    """An estimate in bytes.

    Args:
        gpu: whether a GPU computes.
        eager: whether it does so without CUDA graphs.
    """
    if not gpu:
        return _ACTIVATIONS_ON_CPU
    return _ACTIVATIONS if eager else _ACTIVATIONS + _GRAPHS


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """What one rank allocates, in bytes.

    Attributes:
        weights: its half of the weight files, of the draft model's too.
        graphs: an estimate of CUDA graphs and activations.
        region: the memory of the collectives.
        kv_cache: the size that was given for the KV cache; None if it is the rest of `utilization`.
        utilization: `--gpu-memory-utilization`, the share of a machine's memory that vLLM allocates.
    """

    weights: Size = 0
    graphs: Size = 0
    region: Size = 0
    kv_cache: Size | None = None
    utilization: Annotated[float, Field(ge=0, le=1)] = 0.0

    def kv_cache_of(self, memory: int) -> int:
        """The KV cache on a machine of which vLLM sees `memory` bytes."""
        if self.kv_cache is not None:
            return self.kv_cache
        return max(0, int(self.utilization * memory) - self.weights - self.graphs)

    def total(self, memory: int) -> int:
        """All that the rank allocates on such a machine."""
        return self.weights + self.kv_cache_of(memory) + self.graphs + self.region


def refusal(need: MemoryNeed, scopes: Iterable[Scope], memory: int, reserve: int, host: str, flag: str) -> str | None:
    """Why a start does not fit where least memory is left, with the sum and the remedy; None if it fits.

    Args:
        need: what the rank allocates.
        scopes: of the machine; at least one.
        memory: what vLLM sees as the machine's memory, of which it takes `utilization`.
        reserve: what the settings keep free on the machine.
        host: the machine's name.
        flag: the option of the reserve.
    """
    scope = min(scopes, key=lambda each: each.available - each.reserve_of(reserve))  # what fits there fits elsewhere
    kept = scope.reserve_of(reserve)
    wanted = need.total(memory) + kept
    if wanted <= scope.available:
        return None
    kept_for = f"desktop {gib(kept)} by {flag}" if kept == reserve else f"kept free {gib(kept)}"
    of = "" if need.kv_cache is not None else f" as the rest of {need.utilization:g} x {gib(memory)}"
    return (
        f"the start does not fit into the memory of {host}: {gib(wanted)} GiB (weights {gib(need.weights)}, "
        f"KV cache {gib(need.kv_cache_of(memory))}{of}, graphs and activations {gib(need.graphs)}, "
        f"region {gib(need.region)}, {kept_for}) are more than the {gib(scope.available)} of "
        f"{gib(scope.total)} GiB that are available in {scope.name}; "
        f"{_remedy(need, scope.available - kept, memory, host)}"
    )


def _remedy(need: MemoryNeed, left: int, memory: int, host: str) -> str:
    """What makes a start fit.

    Args:
        need: what the rank allocates.
        left: what it may allocate.
        memory: what vLLM sees as the machine's memory.
        host: the machine's name.
    """
    fixed = need.weights + need.graphs + need.region
    smaller = f"end other programs on {host}, or serve a smaller model, or one with fewer bits for each weight"
    if fixed >= left:
        return smaller
    if need.kv_cache is not None:
        return f"give a KV cache of at most {left - fixed} bytes (--kv-cache-memory-bytes)"
    share = int(100 * (left - need.region) / memory) / 100
    if share * memory <= need.weights + need.graphs:
        return smaller
    return f"give --gpu-memory-utilization {share:g} or less, or end other programs on {host}"
