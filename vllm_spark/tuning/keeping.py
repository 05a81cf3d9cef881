"""What of a search goes into tables: one size after the other, each as soon as its decode steps were compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vllm_spark.tuning.journal import Journal, Kept
from vllm_spark.tuning.outcome import Outcome, Shape
from vllm_spark.tuning.promotion import promoted
from vllm_spark.tuning.tuned_model import TunedModel
from vllm_spark.tuning.tuner import NewTable, store

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
