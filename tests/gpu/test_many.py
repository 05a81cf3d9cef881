"""Very many collectives of random kind, dtype and size, eager and replayed, each checked bit by bit on the GPU."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vllm_spark.bench.gpu_ranks import GpuPair

from .test_results import DTYPES, MODES

COLLECTIVES = int(os.environ.get("VLLMSPARK_GPU_COLLECTIVES", "20000"))
"""How many, in each mode; a million takes a minute."""
GRAPHS, IN_A_GRAPH = 12, 100
MOST_ELEMENTS = 1 << 19
ALIGNMENT = 8  # elements: what is checked here starts on a kernel's vector, whatever the dtype


@dataclass(frozen=True)
class Operation:
    """One collective on a part of a pool of numbers."""

    kind: str
    dtype: torch.dtype
    offset: int
    rows: int
    columns: int

    @classmethod
    def any(cls, chance: random.Random) -> Operation:
        rows = chance.choice([1, 1, 1, 2, 8])
        columns = max(1, int(2 ** (19 * chance.random())) // rows)
        offset = chance.randrange(0, MOST_ELEMENTS, ALIGNMENT)
        return cls(
            chance.choice(["all_reduce", "all_reduce", "gather 0", "gather 1"]),
            chance.choice(DTYPES),
            offset,
            rows,
            columns,
        )


class Checker:
    """One rank: its runtime, both ranks' numbers, and how many results were wrong."""

    def __init__(self, pair: GpuPair, rank: int) -> None:
        self.runtime, self.rank = pair.runtimes[rank], rank
        generator = torch.Generator("cuda").manual_seed(3)
        self.pools = {
            dtype: [torch.randn(2 * MOST_ELEMENTS, device="cuda", generator=generator).to(dtype) for _ in (0, 1)]
            for dtype in DTYPES
        }
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def turn_pools(self) -> None:
        """Makes the next round's numbers others, on both ranks alike."""
        for pools in self.pools.values():
            for pool in pools:
                pool.copy_(pool.roll(8))

    def check(self, operation: Operation) -> None:
        end = operation.offset + operation.rows * operation.columns
        both = [
            pool[operation.offset : end].view(operation.rows, operation.columns) for pool in self.pools[operation.dtype]
        ]
        if operation.kind == "all_reduce":
            result = self.runtime.all_reduce(both[self.rank])
            expected = (both[0].float() + both[1].float()).to(operation.dtype)
        else:
            dim = int(operation.kind[-1])
            result = self.runtime.all_gather(both[self.rank], dim)
            expected = torch.cat(both, dim)
        bits = torch.int32 if operation.dtype == torch.float32 else torch.int16
        self.wrong.add_((result.view(bits) != expected.view(bits)).any())


def run_many(pair: GpuPair) -> None:
    """Runs COLLECTIVES of them; fails the test if one is wrong."""

    def prepare(rank: int) -> tuple[Checker, list[torch.cuda.CUDAGraph]]:
        chance = random.Random(1)  # the same on both ranks
        checker = Checker(pair, rank)
        torch.cuda.current_stream().synchronize()
        pair.barrier.wait()
        graphs = []
        for _ in range(GRAPHS):
            with pair.capture() as graph:
                checker.turn_pools()
                for _ in range(IN_A_GRAPH):
                    checker.check(Operation.any(chance))
            graphs.append(graph)
        return checker, graphs

    prepared = pair.run(prepare)
    before = done_by(pair)

    def body(rank: int) -> tuple[int, int]:
        checker, graphs = prepared[rank]
        chance = random.Random(2)
        done = 0
        while done < COLLECTIVES:
            for _ in range(chance.randrange(3)):
                chance.choice(graphs).replay()
                done += IN_A_GRAPH
            for _ in range(chance.randrange(20)):
                checker.check(Operation.any(chance))
                done += 1
            # Both ranks are threads of one CUDA context here: were one so far ahead that its launches block, the
            # other could launch nothing either.
            torch.cuda.current_stream().synchronize()
        return int(checker.wrong), done

    outcome = pair.run(body)
    for runtime in pair.runtimes:
        runtime.check()
    assert [wrong for wrong, _ in outcome] == [0, 0]
    counted = [after - count for after, count in zip(done_by(pair), before, strict=True)]
    assert counted == [done for _, done in outcome]


def done_by(pair: GpuPair) -> list[int]:
    """How many collectives each rank has done."""
    counters = [runtime.counters() for runtime in pair.runtimes]
    return [count.all_reduces + count.all_gathers for count in counters]


@pytest.mark.parametrize("mode", MODES)
def test_many(make_pair: Callable[..., GpuPair], mode: dict[str, Any]) -> None:
    run_many(make_pair(timeout_s=20.0, **mode))
