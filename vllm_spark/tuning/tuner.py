"""The search over all shapes of a model, and the tables that come of it."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_spark.tuning import fused_moe_search, fused_moe_table, marlin_search, marlin_table
from vllm_spark.tuning.fused_moe_shape import has_own_table, own_row, pinned_rows
from vllm_spark.tuning.fused_moe_table import (
    FusedMoeProvenance,
    FusedMoeShape,
    FusedMoeTable,
    store_fused_moe_table,
)
from vllm_spark.tuning.fused_moe_trial import Trials
from vllm_spark.tuning.gb10 import Device
from vllm_spark.tuning.journal import Journal
from vllm_spark.tuning.marlin_table import MarlinRow, MarlinShape, MarlinTable, store_marlin_table
from vllm_spark.tuning.outcome import FusedMoeOutcome, MarlinOutcome, Outcome, Shape
from vllm_spark.tuning.provenance import VLLM_DEFAULT, Provenance


@dataclass(frozen=True)
class NewFusedMoeTable:
    """A FusedMoE table that is not yet in a file."""

    device: str
    shape: FusedMoeShape
    table: FusedMoeTable
    provenance: FusedMoeProvenance


NewTable = MarlinTable | NewFusedMoeTable


def tune(
    shapes: Sequence[Shape],
    rows: Sequence[int],
    device: Device,
    journal: Journal,
    on_outcome: Callable[[Outcome], None],
    on_trial: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Searches for every shape and number of rows that the journal does not have yet, and writes each into it.

    Args:
        on_outcome: called for each, also for those that were known.
        on_trial: called for every row of a FusedMoE table that was compiled.

    Raises:
        SparkError: no room on the GPU, or a kernel failed.
    """
    known = journal.known()
    outcomes: list[Outcome] = []
    trials = Trials(device)

    def note(outcome: Outcome, *, new: bool) -> None:
        outcomes.append(outcome)
        if new:
            journal.add(outcome)
        on_outcome(outcome)

    for shape in shapes:
        for number in rows:
            if (shape, number) in known:
                note(known[shape, number], new=False)
        missing = [number for number in rows if (shape, number) not in known]
        if not missing:
            continue
        if isinstance(shape, MarlinShape):
            with marlin_search.weights_of(shape) as weights:
                for number in missing:
                    note(marlin_search.search(shape, number, weights, device), new=True)
        else:
            with fused_moe_search.weights_of(shape) as layers:
                for number in missing:
                    before = [each for each in outcomes if isinstance(each, FusedMoeOutcome) and each.shape == shape]
                    found = fused_moe_search.search(shape, number, layers, device, trials, before, on_trial=on_trial)
                    note(found, new=True)
    return outcomes


def tables(
    outcomes: Iterable[Outcome], models: Mapping[Shape, Sequence[str]], device: Device, versions: dict[str, str]
) -> list[NewTable]:
    """A table for each shape, with a row for each number of tokens; where the default won, the row says so.

    Args:
        models: labels of those that have a shape.
        device: on which was measured.
        versions: of what it was measured with.
    """
    outcomes = list(outcomes)
    marlin: dict[MarlinShape, dict[int, MarlinRow]] = {}
    for outcome in outcomes:
        if isinstance(outcome, MarlinOutcome):
            marlin.setdefault(outcome.shape, {})[outcome.rows] = MarlinRow(
                **outcome.parameters.model_dump(), provenance=_measured(outcome, device, versions)
            )
    made: list[NewTable] = [
        MarlinTable(device=device.name, shape=shape, models=tuple(models.get(shape, ())), rows=rows)
        for shape, rows in marlin.items()
    ]
    fused: dict[FusedMoeShape, list[FusedMoeOutcome]] = {}
    for outcome in outcomes:
        if isinstance(outcome, FusedMoeOutcome):
            fused.setdefault(outcome.shape.table, []).append(outcome)
    return made + [_fused_moe_table(shape, each, models, device, versions) for shape, each in fused.items()]


def store(new: Iterable[NewTable], folder: Path) -> list[Path]:
    """Writes tables where `lookup` finds them below `folder`; returns their paths.

    Raises:
        ConfigurationError: they cannot be written.
    """
    return [
        store_marlin_table(table, folder / marlin_table.FOLDER)
        if isinstance(table, MarlinTable)
        else store_fused_moe_table(
            table.shape, table.device, table.table, table.provenance, folder / fused_moe_table.FOLDER
        )
        for table in new
    ]


def _fused_moe_table(
    shape: FusedMoeShape,
    outcomes: Sequence[FusedMoeOutcome],
    models: Mapping[Shape, Sequence[str]],
    device: Device,
    versions: dict[str, str],
) -> NewFusedMoeTable:
    """What was measured, and above it vLLM's own choice, so that no larger step takes a row of a decode step."""
    rows: dict[int, dict[str, int]] = {}
    sources: dict[int, Provenance] = {}
    for number, outcome in _agreed(outcomes).items():
        choice = outcome.parameters
        rows[number] = own_row(outcome.shape, device.name, number) if choice is None else choice.row()
        sources[number] = _measured(outcome, device, versions)
    largest = outcomes[0].shape
    pinned = pinned_rows(largest, device.name, above=max(rows))
    if has_own_table(largest, device.name):
        why = Provenance(kind="published", source=f"the table that comes with vLLM {versions.get('vllm', '')}".strip())
    else:
        why = Provenance(kind="derived", rule=VLLM_DEFAULT, versions=versions)
    labels = dict.fromkeys(label for outcome in outcomes for label in models.get(outcome.shape, ()))
    groups = {outcome.shape.group_size for outcome in outcomes}
    provenance = FusedMoeProvenance(
        models=tuple(labels),
        group_size=groups.pop() if len(groups) == 1 and largest.is_int4 else None,
        rows=sources | dict.fromkeys(pinned, why),
    )
    table = FusedMoeTable(dict(sorted((rows | pinned).items())), versions.get("triton"))
    return NewFusedMoeTable(device.name, shape, table, provenance)


def _agreed(outcomes: Sequence[FusedMoeOutcome]) -> dict[int, FusedMoeOutcome]:
    """One for each number of tokens; where several shapes share a table and disagree, the default stays."""
    found: dict[int, FusedMoeOutcome] = {}
    for outcome in sorted(outcomes, key=lambda each: each.rows):
        other = found.setdefault(outcome.rows, outcome)
        if other.parameters != outcome.parameters:
            found[outcome.rows] = outcome.with_default()
    return found


def _measured(outcome: Outcome, device: Device, versions: dict[str, str]) -> Provenance:
    return Provenance(
        kind="measured",
        device=device.name,
        date=datetime.date.today(),
        versions=versions,
        gain=round(1 - outcome.ratio, 4),
    )
