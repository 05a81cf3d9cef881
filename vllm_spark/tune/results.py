"""Results of a search for one kernel, shape and number of tokens."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import Self

from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, FusedMoeParameters
from vllm_spark.kernels.marlin.rules import block_size_m
from vllm_spark.kernels.marlin.table import MarlinParameters, MarlinShape

BLOCK_SIZE_M = 8
"""Rows of an expert in a tile of Marlin: vLLM's choice for decode steps of up to 8 tokens."""

MARLIN_DEFAULT = MarlinParameters(block_size_m=BLOCK_SIZE_M)
"""The kernel's own choice of tile and blocks."""


def is_vllm_default(parameters: object) -> bool:
    """Whether the parameters, of either kernel, are vLLM's own choice."""
    return parameters is None or parameters == MARLIN_DEFAULT


class _Outcome(BaseModel):
    """Common part of all outcomes.

    Attributes:
        DEFAULT: the parameters that stand for vLLM's own choice.
        rows: tokens of the step.
        default_us: microseconds of one call with vLLM's default, median of the confirmation.
        tuned_us: the same with the winner; equal where the default stays.
        ratio: tuned over default, median of the rounds' ratios.
        date: of the measurement.
    """

    model_config = ConfigDict(frozen=True)
    DEFAULT: ClassVar[MarlinParameters | None] = None

    rows: int
    default_us: float
    tuned_us: float
    ratio: float
    date: datetime.date = Field(default_factory=datetime.date.today)

    def with_default(self) -> Self:
        """The same outcome with the default as its winner."""
        return self.model_copy(update={"parameters": self.DEFAULT, "tuned_us": self.default_us, "ratio": 1.0})


class MarlinOutcome(_Outcome):
    """Of Marlin's kernel for experts.

    Attributes:
        shape: one GEMM.
        parameters: the winner, or `MARLIN_DEFAULT`.
        tried: ratio to the default in the search, for all parameters that the kernel accepted.
    """

    DEFAULT = MARLIN_DEFAULT

    kind: Literal["marlin"] = "marlin"
    shape: MarlinShape
    parameters: MarlinParameters
    tried: list[tuple[MarlinParameters, float]]


class FusedMoeOutcome(_Outcome):
    """Of vLLM's Triton kernel for experts: both GEMMs and the activation between them.

    Attributes:
        shape: the experts.
        parameters: the winner; None for vLLM's own choice.
        tried: as in `MarlinOutcome`; for pruned candidates, the ratio in the first rounds.
    """

    kind: Literal["fused_moe"] = "fused_moe"
    shape: FusedMoeExperts
    parameters: FusedMoeParameters | None
    tried: list[tuple[FusedMoeParameters, float]]


Outcome = Annotated[MarlinOutcome | FusedMoeOutcome, Field(discriminator="kind")]
"""Of any kernel."""

Shape = MarlinShape | FusedMoeExperts
"""Shape of any kernel."""


def tunable_rows(shape: Shape, rows: Iterable[int]) -> list[int]:
    """The numbers in `rows` for which a table can have an entry.

    Marlin is tuned for block_size_m = 8 only. If each expert gets nearly all tokens, vLLM uses larger blocks for 8
    tokens already.
    """
    if not isinstance(shape, MarlinShape):
        return list(rows)
    return [number for number in rows if block_size_m(number, shape.top_k, shape.experts) == BLOCK_SIZE_M]
