"""New tables from the outcomes of a search, merged with earlier results, and their files."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_spark.errors import ConfigurationError
from vllm_spark.kernels.devices import Device
from vllm_spark.kernels.fused_moe import table as fused_moe_table
from vllm_spark.kernels.fused_moe.shapes import vllm_row
from vllm_spark.kernels.fused_moe.table import (
    FusedMoeProvenance,
    FusedMoeShape,
    FusedMoeTable,
    load_fused_moe_provenance,
    load_fused_moe_table,
    provenance_path,
    store_fused_moe_table,
)
from vllm_spark.kernels.fused_moe.vllm_rows import repeats_vllm, rows_around, vllm_rows_provenance
from vllm_spark.kernels.marlin import table as marlin_table
from vllm_spark.kernels.marlin.table import (
    MarlinRow,
    MarlinShape,
    MarlinTable,
    load_marlin_table,
    store_marlin_table,
)
from vllm_spark.kernels.table import VLLM_DEFAULT, Provenance
from vllm_spark.tune.journal import Kept
from vllm_spark.tune.results import MARLIN_DEFAULT, FusedMoeOutcome, MarlinOutcome, Outcome, Shape


@dataclass(frozen=True)
class NewFusedMoeTable:
    """A FusedMoE table that has not been written yet."""

    device: str
    shape: FusedMoeShape
    table: FusedMoeTable
    provenance: FusedMoeProvenance


NewTable = MarlinTable | NewFusedMoeTable


def new_tables(
    outcomes: Iterable[Outcome],
    models: Mapping[Shape, Sequence[str]],
    device: Device,
    versions: dict[str, str],
    kept: Iterable[Kept] = (),
    folder: Path | None = None,
) -> list[NewTable]:
    """A table for each shape, with a row for each number of tokens up to the largest.

    A row is the default if that won, or if it was not measured. Rows in an existing table that were not measured this
    time are kept, if device and versions are the same.

    Args:
        models: labels of the models that have a shape.
        device: that was measured.
        versions: of the software.
        kept: entries of earlier searches with this device and these versions; those of other models are included if
            their table has the same name.
        folder: of the existing tables, which may have rows that are not in the journal.
    """
    outcomes = list(outcomes)
    fresh = {(outcome.shape, outcome.rows) for outcome in outcomes}
    names = {_table_of(outcome.shape) for outcome in outcomes}
    labels = {shape: list(its) for shape, its in models.items()}
    for each in kept:
        shape = each.outcome.shape
        if _table_of(shape) in names:
            labels[shape] = list(dict.fromkeys((*labels.get(shape, ()), *each.models)))
            if (shape, each.outcome.rows) not in fresh:
                outcomes.append(each.outcome)
    marlin: dict[MarlinShape, dict[int, MarlinRow]] = {}
    fused: dict[FusedMoeShape, list[FusedMoeOutcome]] = {}
    for outcome in outcomes:
        if isinstance(outcome, MarlinOutcome):
            marlin.setdefault(outcome.shape, {})[outcome.rows] = MarlinRow(
                **outcome.parameters.model_dump(), provenance=_measured(outcome, device, versions)
            )
        else:
            fused.setdefault(outcome.shape.table, []).append(outcome)
    made: list[NewTable] = [
        _marlin_table(shape, rows, labels.get(shape, ()), device, versions, folder) for shape, rows in marlin.items()
    ]
    return made + [_fused_moe_table(shape, each, labels, device, versions, folder) for shape, each in fused.items()]


def store_tables(
    new: Iterable[NewTable], folder: Path, on_note: Callable[[str], None] = lambda sentence: None
) -> list[Path]:
    """Writes tables where `lookup` finds them below `folder`; returns their paths.

    Args:
        on_note: called with a sentence about each table that was backed up (`_back_up`).

    Raises:
        ConfigurationError: they cannot be written.
    """
    written = []
    for table in new:
        if isinstance(table, MarlinTable):
            place = folder / marlin_table.FOLDER
            _back_up(place / table.file_name, table.device, on_note)
            written.append(store_marlin_table(table, place))
        else:
            place = folder / fused_moe_table.FOLDER
            _back_up(place / table.shape.file_name(table.device), table.device, on_note)
            written.append(store_fused_moe_table(table.shape, table.device, table.table, table.provenance, place))
    return written


def _back_up(path: Path, device: str, on_note: Callable[[str], None]) -> None:
    """Copies the table in `path` and its provenance, if it has rows that were not made by a tuner."""
    try:
        if not path.is_file() or _is_all_ours(path, device):
            return
        names = (f".bak{number or ''}" for number in itertools.count())
        suffix = next(name for name in names if not path.with_name(path.name + name).exists())
        for each in (path, provenance_path(path)):
            if each.is_file():
                shutil.copyfile(each, each.with_name(each.name + suffix))
    except OSError as error:
        raise ConfigurationError(
            f"the table {path} has rows that were not measured here, and cannot be backed up ({error.strerror}) before "
            "it is replaced; move it elsewhere"
        ) from None
    on_note(f"{path.name} had rows that were not measured here; a copy of it is {path}{suffix}.")


def _is_all_ours(path: Path, device: str) -> bool:
    """Whether a tuner made every row of the table in `path`."""
    sources: list[Provenance | None]
    try:
        if path.parent.name == marlin_table.FOLDER:
            sources = [row.provenance for row in load_marlin_table(path).rows.values()]
        else:
            noted = load_fused_moe_provenance(path) or FusedMoeProvenance()
            sources = [noted.rows.get(number) for number in load_fused_moe_table(path).rows]
    except ConfigurationError:
        return False
    return all(
        row is not None and (repeats_vllm(row) or (row.kind, row.device) == ("measured", device)) for row in sources
    )


def _table_of(shape: Shape) -> MarlinShape | FusedMoeShape:
    """The shape in the table's name."""
    return shape if isinstance(shape, MarlinShape) else shape.table


def _marlin_table(
    shape: MarlinShape,
    rows: Mapping[int, MarlinRow],
    models: Sequence[str],
    device: Device,
    versions: dict[str, str],
    folder: Path | None,
) -> MarlinTable:
    there: dict[int, MarlinRow] = {}
    if folder is not None:
        with suppress(ConfigurationError):  # a missing or unusable table is replaced
            old = load_marlin_table(folder / marlin_table.FOLDER / shape.file_name(device.name))
            there = {number: row for number, row in old.rows.items() if _is_of(row.provenance, device, versions)}
            models = tuple(dict.fromkeys((*models, *(old.models if there else ()))))
    merged = {**there, **rows}
    unmeasured = MarlinRow(
        **MARLIN_DEFAULT.model_dump(), provenance=Provenance(kind="derived", rule=VLLM_DEFAULT, versions=versions)
    )
    # A step uses the nearest row: without these rows it would use the tile of another step.
    filled = {number: merged.get(number, unmeasured) for number in range(1, max(merged) + 1)}
    return MarlinTable(device=device.name, shape=shape, models=tuple(models), rows=filled)


def _fused_moe_table(
    shape: FusedMoeShape,
    outcomes: Sequence[FusedMoeOutcome],
    models: Mapping[Shape, Sequence[str]],
    device: Device,
    versions: dict[str, str],
    folder: Path | None,
) -> NewFusedMoeTable:
    """The measured rows, and vLLM's own choice for all other steps, so that they do not use a measured row."""
    rows: dict[int, dict[str, int]] = {}
    sources: dict[int, Provenance] = {}
    labels = dict.fromkeys(label for outcome in outcomes for label in models.get(outcome.shape, ()))
    groups = {outcome.shape.group_size for outcome in outcomes}
    largest = outcomes[0].shape
    group_size = groups.pop() if len(groups) == 1 and largest.is_int4 else None
    if folder is not None:
        with suppress(ConfigurationError):
            path = folder / fused_moe_table.FOLDER / shape.file_name(device.name)
            old, noted = load_fused_moe_table(path), load_fused_moe_provenance(path) or FusedMoeProvenance()
            if noted.group_size == group_size:
                sources = {
                    number: source
                    for number, source in noted.rows.items()
                    if number in old.rows and _is_of(source, device, versions)
                }
                rows = {number: old.rows[number] for number in sources}
                labels |= dict.fromkeys(noted.models if rows else ())
    for number, outcome in _agreed(outcomes).items():
        choice = outcome.parameters
        rows[number] = vllm_row(outcome.shape, device.name, number) if choice is None else choice.row()
        sources[number] = _measured(outcome, device, versions)
    around = rows_around(rows, max(rows), largest, device.name)
    sources |= dict.fromkeys(around, vllm_rows_provenance(largest, device.name, versions))
    provenance = FusedMoeProvenance(models=tuple(labels), group_size=group_size, rows=sources)
    table = FusedMoeTable(dict(sorted((rows | around).items())), versions.get("triton"))
    return NewFusedMoeTable(device.name, shape, table, provenance)


def _is_of(source: Provenance | None, device: Device, versions: dict[str, str]) -> bool:
    """Whether a row was measured on this device with these versions."""
    return source is not None and (source.kind, source.device, source.versions) == ("measured", device.name, versions)


def _agreed(outcomes: Sequence[FusedMoeOutcome]) -> dict[int, FusedMoeOutcome]:
    """One outcome for each number of tokens; the default, if shapes that share a table disagree.

    The default also stays for steps that were not measured with each group size of int4: a tile for one may be invalid
    for another.
    """
    found: dict[int, FusedMoeOutcome] = {}
    measured: dict[int, set[int]] = {}
    for outcome in sorted(outcomes, key=lambda each: each.rows):
        other = found.setdefault(outcome.rows, outcome)
        if other.parameters != outcome.parameters:
            found[outcome.rows] = outcome.with_default()
        measured.setdefault(outcome.rows, set()).add(outcome.shape.group_size)
    groups = set().union(*measured.values())
    return {rows: each if measured[rows] == groups else each.with_default() for rows, each in found.items()}


def _measured(outcome: Outcome, device: Device, versions: dict[str, str]) -> Provenance:
    return Provenance(
        kind="measured",
        device=device.name,
        date=outcome.date,
        versions=versions,
        gain=round(1 - outcome.ratio, 4),
    )
