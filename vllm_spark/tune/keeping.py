"""What of a search goes into tables: rows whose decode step became faster as a whole, size after size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from vllm_spark.tune.journal import Journal, Kept
from vllm_spark.tune.results import Outcome, Shape
from vllm_spark.tune.tuned_model import TunedModel
from vllm_spark.tune.tuner import NewTable, store

FASTER = 0.995
"""Of an untuned step's time: less is more than two equal engines differ by, in the median of some rounds."""

Judge = Callable[[TunedModel, list[Shape], list[NewTable]], dict[int, float]]
"""Compares decode steps of a model with and without tables, and gives ratios as `promoted` takes them."""


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
