"""Parameters of the FusedMoE kernel that others measured on a GB10, and the tables made of them.

A set is what one source measured for one shape: a file in `configs/published/`, with the source of each row. Its table
has these rows, and vLLM's own choice for all other steps (`published_table`); `vllm_spark/tune/fused_moe/published.py`
writes the tables of all sets into `configs/`.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vllm_spark.kernels.finding import spans
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, FusedMoeParameters, has_default, pinned_rows, vllm_row
from vllm_spark.kernels.fused_moe.table import FusedMoeProvenance, FusedMoeShape, FusedMoeTable
from vllm_spark.kernels.fused_moe.vllm_rows import rows_around, vllm_rows_provenance
from vllm_spark.kernels.table import VLLM_DEFAULT, Provenance, explained, read_json, row_numbers

FOLDER = "published"
"""Folder of the sets in `configs/`."""

_LARGEST_IN_STEPS = 256
"""Tokens up to which a table has a row for each step, if vLLM's choice is known."""


class PublishedRow(FusedMoeParameters):
    """Parameters for one number of tokens.

    Attributes:
        gain: share of the time of vLLM's choice that they save, by the source's times; None if it has none.
        note: what was compared, where that is not the set's own comparison.
    """

    gain: float | None = Field(default=None, allow_inf_nan=False)
    note: str | None = None

    def parameters(self) -> dict[str, int]:
        """The row in a table."""
        return self.model_dump(exclude={"gain", "note"})


class PublishedSet(BaseModel):
    """What one source measured for one shape.

    Attributes:
        source: repository and commit, or page.
        page: the files there.
        grade: as in `Provenance`; None if it was not graded.
        device: on which it was measured.
        machine: as the source describes it.
        date: of the measurement.
        versions: of the software, as far as the source names them.
        measured: what was measured, and against what.
        shape: the experts.
        models: whose layers have this shape on one rank, at which tensor parallel size.
        rows: tokens of a step to parameters; a step between two rows uses the nearer one.
        vllm: rows between them that stay vLLM's choice, since it was as fast or faster there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1)
    page: str = Field(min_length=1)
    grade: Literal["A", "B"] | None = None
    device: str
    machine: str | None = None
    date: datetime.date
    versions: dict[str, str] = Field(default_factory=dict)
    measured: str = Field(min_length=1)
    shape: FusedMoeExperts
    models: tuple[str, ...]
    rows: Annotated[dict[int, PublishedRow], BeforeValidator(row_numbers)] = Field(min_length=1)
    vllm: tuple[int, ...] = ()

    def provenance(self, tokens: int) -> Provenance:
        """Of the row for `tokens`."""
        row = self.rows[tokens]
        return Provenance(
            kind="published",
            device=self.device,
            date=self.date,
            versions=self.versions,
            gain=row.gain,
            source=self.source,
            grade=self.grade,
            note="; ".join(each for each in (self.page, self.machine, self.measured, row.note) if each),
        )


def load_published_set(path: Path) -> PublishedSet:
    """The set in `path`.

    Raises:
        ConfigurationError: it cannot be read or is not such a set; the message names the file and the fault.
    """
    with explained(path, "published set"):
        return PublishedSet.model_validate(read_json(path))


class LeftOut(BaseModel):
    """A set that is not used.

    Attributes:
        source: repository and commit, or page.
        grade: `A` and `B` as in `Provenance`; `C` origin unclear, copied or derived; `X` not usable.
        experts: of the shape in its name.
        size_n: likewise.
        dtype: likewise.
        block_shape: likewise.
        reason: why it is not used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1)
    grade: Literal["A", "B", "C", "X"]
    experts: int
    size_n: int
    dtype: str | None
    block_shape: tuple[int, int] | None
    reason: str = Field(min_length=1)

    @property
    def shape(self) -> FusedMoeShape:
        """The shape that it is for."""
        return FusedMoeShape(self.experts, self.size_n, self.dtype, self.block_shape)


class _SetsLeftOut(BaseModel):
    """The content of `left_out.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sets: list[LeftOut]


def sets_left_out(configs: Path) -> list[LeftOut]:
    """The sets in `left_out.json` of `configs`.

    Raises:
        ConfigurationError: it cannot be read or is invalid.
    """
    path = configs / "left_out.json"
    with explained(path, "list of published sets"):
        return _SetsLeftOut.model_validate(read_json(path)).sets


def published_sets(configs: Path) -> dict[str, PublishedSet]:
    """The sets in the folder `published` of `configs`, by the names of their files.

    Raises:
        ConfigurationError: as for `load_published_set`.
    """
    return {path.stem: load_published_set(path) for path in sorted((configs / FOLDER).glob("*.json"))}


def published_table(published: PublishedSet, versions: Mapping[str, str]) -> tuple[FusedMoeTable, FusedMoeProvenance]:
    """The rows of a set, and the installed vLLM's choice for the steps below, between and above them.

    Args:
        published: the set.
        versions: of the installed software; vLLM's choice is that of its version.
    """
    shape, device, largest = published.shape, published.device, max(published.rows)
    if has_default(shape.table) and largest <= _LARGEST_IN_STEPS:
        rows, sources = _each_step(published)
        around = rows_around(rows, largest, shape, device)
        # Another version of vLLM replaces these rows when it reads the table.
        default = vllm_rows_provenance(shape, device, {"vllm": versions["vllm"]})
    else:
        rows = {tokens: row.parameters() for tokens, row in published.rows.items()}
        sources = {tokens: published.provenance(tokens) for tokens in published.rows}
        around = {tokens: vllm_row(shape, device, tokens) for tokens in published.vllm}
        if (first := min(published.rows)) > 1:
            around |= pinned_rows(shape, device, above=0, upto=first - 1)
        around |= pinned_rows(shape, device, above=largest)
        # Int4: without a version, since the rule of vLLM 0.32 is valid with each. Earlier ones choose blocks of 3 or 5
        # rows, which the kernel does not have.
        known = has_default(shape.table)
        default = (
            vllm_rows_provenance(shape, device, {"vllm": versions["vllm"]})
            if known
            else Provenance(kind="derived", rule=VLLM_DEFAULT)
        )
    table = FusedMoeTable(dict(sorted((around | rows).items())), published.versions.get("triton"))
    noted = FusedMoeProvenance(
        models=published.models,
        group_size=shape.group_size or None,
        hidden=shape.hidden,
        top_k=shape.top_k,
        rows=dict.fromkeys(around, default) | sources,
    )
    return table, noted


def _each_step(published: PublishedSet) -> tuple[dict[int, dict[str, int]], dict[int, Provenance]]:
    """A row for each step whose nearest row is one of the set's."""
    first = min(published.rows)
    nearest = spans(dict.fromkeys((*published.rows, *published.vllm)), max(published.rows))
    rows: dict[int, dict[str, int]] = {}
    sources: dict[int, Provenance] = {}
    for tokens, row in published.rows.items():
        start, end = nearest[tokens]
        for step in range(max(start, first), end + 1):
            rows[step] = row.parameters()
            sources[step] = published.provenance(tokens)
    return rows, sources
