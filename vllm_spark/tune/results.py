"""What comes of a search for one kernel, shape and number of tokens."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import Self

from vllm_spark import __version__
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, FusedMoeParameters
from vllm_spark.kernels.marlin.rules import block_size_m
from vllm_spark.kernels.marlin.table import MarlinParameters, MarlinShape
from vllm_spark.tune.journal import Journal, Kept
from vllm_spark.tune.tuned_model import TunedModel
from vllm_spark.tune.tuner import NewTable, store


def installed_versions() -> dict[str, str]:
    """Of vLLM, torch, Triton and this project, and of NVIDIA's driver where there is one.

    Asks the packages themselves: some are distributed under other names.
    """
    import torch
    import triton
    import vllm

    versions = {
        "vllm": str(vllm.__version__),
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "vllm_spark": __version__,
    }
    driver = _driver_version()
    return versions if driver is None else {**versions, "driver": driver}


def _driver_version() -> str | None:
    from vllm.third_party import pynvml

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            version = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
        return version.decode() if isinstance(version, bytes) else str(version)
    return None


BLOCK_SIZE_M = 8
"""Rows of an expert in a tile of Marlin: what vLLM takes for decode steps of so few tokens."""

MARLIN_DEFAULT = MarlinParameters(block_size_m=BLOCK_SIZE_M)
"""Leaves tile and blocks to the kernel."""


def is_vllms_choice(parameters: object) -> bool:
    """Whether parameters of either kernel leave vLLM its choice."""
    return parameters is None or parameters == MARLIN_DEFAULT


class _Outcome(BaseModel):
    """What every outcome has.

    Attributes:
        DEFAULT: the parameters that leave vLLM its choice.
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
        """The outcome, had the default won."""
        return self.model_copy(update={"parameters": self.DEFAULT, "tuned_us": self.default_us, "ratio": 1.0})


class MarlinOutcome(_Outcome):
    """Of Marlin's kernel for experts.

    Attributes:
        shape: one GEMM.
        parameters: the winner, or `MARLIN_DEFAULT`.
        tried: ratio to the default in the search, for everything that the kernel took.
    """

    DEFAULT = MARLIN_DEFAULT

    kind: Literal["marlin"] = "marlin"
    shape: MarlinShape
    parameters: MarlinParameters
    tried: list[tuple[MarlinParameters, float]]


class FusedMoeOutcome(_Outcome):
    """Of vLLM's Triton kernel: both GEMMs, and what is between them.

    Attributes:
        shape: the experts.
        parameters: the winner; None for vLLM's own choice.
        tried: as in `MarlinOutcome`; of those that were left out early, the ratio of the first rounds.
    """

    kind: Literal["fused_moe"] = "fused_moe"
    shape: FusedMoeExperts
    parameters: FusedMoeParameters | None
    tried: list[tuple[FusedMoeParameters, float]]


Outcome = Annotated[MarlinOutcome | FusedMoeOutcome, Field(discriminator="kind")]
"""Of any kernel."""

Shape = MarlinShape | FusedMoeExperts
"""What is searched for."""


def tunable_rows(shape: Shape, rows: Iterable[int]) -> list[int]:
    """Those of `rows` for which a table can hold an entry.

    Marlin is tuned for the blocks that vLLM makes of few tokens. Where each expert gets nearly all of them, it makes
    larger blocks of 8 tokens already.
    """
    if not isinstance(shape, MarlinShape):
        return list(rows)
    return [number for number in rows if block_size_m(number, shape.top_k, shape.experts) == BLOCK_SIZE_M]


Judge = Callable[[TunedModel, list[Shape], list[NewTable]], dict[int, float]]
"""Compares decode steps of a model with and without tables, and gives ratios as `promotion.promoted` takes them."""


def keep(
    outcomes: Sequence[Outcome],
    sizes: Sequence[tuple[TunedModel, list[Shape]]],
    labels: Mapping[Shape, Sequence[str]],
    tables_of: Callable[[list[Outcome]], list[NewTable]],
    judge: Judge | None,
    journal: Journal,
    out: Path,
    on_size: Callable[[list[Path]], None],
    on_note: Callable[[str], None],
) -> None:
    """Judges each size, and writes into the journal and into tables what has won.

    What one size has won is not lost when the next one fails.

    Args:
        outcomes: of the search.
        sizes: the model at each size, and its shapes.
        labels: for each shape, the models and sizes that have it.
        tables_of: those that outcomes make, together with what the journal and `out` have.
        judge: None if nothing is compared.
        journal: in the tables' folder.
        out: the tables' folder.
        on_size: called after each size with the tables that were written.
        on_note: see `tuner.store`.

    Raises:
        SparkError: an engine failed, or a file cannot be written.
    """
    judged: dict[tuple[Shape, int], Outcome] = {(outcome.shape, outcome.rows): outcome for outcome in outcomes}
    for model, its in sizes:
        mine = [outcome for outcome in judged.values() if outcome.shape in its]
        if mine and judge is not None:
            mine = promoted(mine, judge(model, its, tables_of(mine)))
            judged |= {(outcome.shape, outcome.rows): outcome for outcome in mine}
        journal.keep([Kept(outcome, tuple(labels[outcome.shape])) for outcome in mine])
        on_size(store(tables_of(mine), out, on_note))


FASTER = 0.995
"""Of an untuned step's time: less is more than two equal engines differ by, in the median of some rounds."""


def is_kept(ratio: float) -> bool:
    """Whether a decode step is so much faster that its rows are kept.

    Args:
        ratio: of its time, tuned over untuned.
    """
    return ratio < FASTER


def promoted(outcomes: Iterable[Outcome], ratios: Mapping[int, float]) -> list[Outcome]:
    """The outcomes, with the default back in rows whose decode step did not become faster.

    Args:
        outcomes: of the search.
        ratios: of a decode step's time, tuned over untuned, by batch; a row is judged by the batch nearest to it.
    """
    kept: list[Outcome] = []
    for outcome in outcomes:
        batch = min(ratios, key=lambda known: abs(known - outcome.rows))
        kept.append(outcome if is_kept(ratios[batch]) else outcome.with_default())
    return kept
