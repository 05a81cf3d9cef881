"""Random collectives whose results both ranks compute to the last bit, on CPU or CUDA tensors."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import torch

from vllm_spark.collective import Runtime
from vllm_spark.first_run.context import Context
from vllm_spark.first_run.result import Advice, StepFailedError

LARGEST = 64 << 10
"""Elements of the largest random input."""

_CHECK_INTERVAL = 512
"""Collectives between two looks at results on a GPU, which wait for all kernels."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BITS = {2: torch.int16, 4: torch.int32}
_FACTOR = 1_000_003

ADVICE = Advice(
    "a message was changed or mixed up on its way, so that a model would compute wrong tokens",
    "do not serve with this pair; replace the cable, update the firmware of the network card, and send the report file "
    "to the maintainers",
)


class CheckedCollectives:
    """A sequence of random collectives that is the same on both ranks.

    Both ranks draw the same random numbers for both inputs, so each computes the result.

    Args:
        runtime: connected.
        seed: the same on both ranks.
        largest: number of elements of the largest input.
    """

    BYTES = 4
    """Of an element, where the number of elements is given: it is float32."""

    def __init__(self, runtime: Runtime, seed: int, largest: int = LARGEST) -> None:
        self._runtime, self._largest = runtime, largest
        self._choice = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        pools = [torch.randn(2 * largest, generator=generator) * 100 for _ in range(2)]
        self._pools = {dtype: [pool.to(dtype).to(runtime.device) for pool in pools] for dtype in _DTYPES}
        self._digest = torch.zeros((), dtype=torch.int64, device=runtime.device)
        self._wrong = torch.zeros((), dtype=torch.bool, device=runtime.device)
        self.done = 0

    def run(self, elements: int | None = None) -> None:
        """Runs and checks one collective, of random size and type without `elements`; on a GPU it may check later.

        Raises:
            StepFailedError: a bit is wrong.
            CollectiveError: the collective failed.
        """
        call, expected, what = self._next(elements)
        self._compare(call(), expected)
        self.done += 1
        if self._runtime.device == "cpu" or self.done % _CHECK_INTERVAL == 0:
            self.check(what)

    def captured(self, count: int) -> tuple[list[Callable[[], torch.Tensor]], list[torch.Tensor]]:
        """The next `count` collectives to be captured in a graph, and their expected results."""
        drawn = [self._next(None)[:2] for _ in range(count)]
        return [call for call, _ in drawn], [expected for _, expected in drawn]

    def compare(self, results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
        """Checks results of collectives of `captured`; raises as `run`."""
        for result, wanted in zip(results, expected, strict=True):
            self._compare(result, wanted)
            self.done += 1
        self.check("a replay of a CUDA graph")

    def check(self, what: str = "") -> None:
        """Waits for what was launched; raises as `run`."""
        wrong = bool(self._wrong)  # waits for a GPU
        self._runtime.check()  # a collective that failed has no result
        if wrong:
            where = f"collective {self.done} ({what})" if what else f"one of the collectives up to {self.done}"
            raise StepFailedError(f"the result of {where} has wrong bits", ADVICE)

    @property
    def digest(self) -> str:
        """A digest of all results, in order."""
        return f"{int(self._digest) & (1 << 64) - 1:016x}"

    @property
    def rail_states(self) -> tuple[str, ...]:
        """The state of each rail, as of `Counters`."""
        return self._runtime.counters().rail_states

    def _next(self, elements: int | None) -> tuple[Callable[[], torch.Tensor], torch.Tensor, str]:
        choice = self._choice
        dtype = torch.float32 if elements is not None else choice.choice(_DTYPES)
        if elements is None:
            elements = min(self._largest, int(2 ** choice.uniform(0, math.log2(self._largest))))
        at = choice.randrange(self._largest)
        inputs = [_cut(pool, at, elements) for pool in self._pools[dtype]]
        mine = inputs[self._runtime.rank]
        what = f"{elements} elements of {str(dtype).removeprefix('torch.')}"
        if choice.randrange(3):
            expected = (inputs[0].float() + inputs[1].float()).to(dtype)
            return lambda: self._runtime.all_reduce(mine), expected, f"all-reduce of {what}"
        return lambda: self._runtime.all_gather(mine, 0), torch.cat(inputs), f"all-gather of {what}"

    def _compare(self, result: torch.Tensor, expected: torch.Tensor) -> None:
        bits: Any = _BITS[expected.element_size()]
        found = result.view(bits)
        self._wrong |= (found != expected.view(bits)).any()
        self._digest = self._digest * _FACTOR + found.sum(dtype=torch.int64)


@dataclasses.dataclass(frozen=True)
class _Digest:
    digest: str


def compare_digests(context: Context, checked: CheckedCollectives) -> str:
    """The digest of all results, which is the same on both machines.

    Raises:
        StepFailedError: it is another one there.
    """
    mine = _Digest(checked.digest)
    theirs = context.swap(mine)
    if mine != theirs:
        raise StepFailedError(
            f"the digest of {checked.done} results is {mine.digest} here and {theirs.digest} on the other machine",
            ADVICE,
        )
    return mine.digest


def _cut(pool: torch.Tensor, at: int, elements: int) -> torch.Tensor:
    """`elements` of the pool from `at`; it is repeated if it is too short."""
    if at + elements > len(pool):
        pool = pool.repeat(-(-(at + elements) // len(pool)))
    return pool[at : at + elements]
