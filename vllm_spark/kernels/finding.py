"""Findings of `vllm-spark tune --check`, and the rules that hold for every kind of table."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_spark.kernels.devices import DEVICES
from vllm_spark.kernels.table import VLLM_DEFAULT, Provenance

TOLERATED_LOSS = 0.02
"""Largest measured slowdown of an entry, as a share of the default's time: the spread of repeated measurements."""

_FARTHEST = 3
"""Largest ratio of a step's tokens to those of the row that it uses as the nearest one."""


@dataclass(frozen=True)
class Finding:
    """One error or note about a table.

    Attributes:
        table: the file.
        row: the number of tokens whose row it is about; None for the whole table.
        kind: `error` makes the check fail, `note` does not.
        sentence: what is wrong, with the value.
    """

    table: Path
    row: int | None
    kind: Literal["error", "note"]
    sentence: str


def device_findings(table: Path, device: str, rows: Iterable[Provenance | None]) -> Iterator[Finding]:
    """Findings about the device that a table is for."""
    if device in DEVICES:
        return
    rows = list(rows)
    # Around those that were measured are rows of vLLM's own: its rule, or its table for this device.
    measured = {row.device for row in rows if row is not None and row.kind == "measured"}
    guessed = any(row is None or (row.kind == "derived" and row.rule != VLLM_DEFAULT) for row in rows)
    if measured == {device} and not guessed:
        sentence = f"the limits of {device} are not known; only rules that hold for every GPU were checked"
        yield Finding(table, None, "note", sentence)
        return
    known = ", ".join(DEVICES)
    yield Finding(
        table,
        None,
        "error",
        f"its device is {device!r}, whose limits are not known, and its rows were not measured there; tune on that "
        f"device, or use the name of a known one ({known})",
    )


def provenance_findings(table: Path, row: int, device: str, provenance: Provenance | None) -> Iterator[Finding]:
    """Findings about the provenance of one entry."""
    if provenance is None:
        yield Finding(table, row, "error", "this row has no provenance; add it")
        return
    if gaps := provenance.missing_fields():
        yield Finding(table, row, "error", f"its provenance is {provenance.kind!r} and lacks {', '.join(gaps)}")
    if provenance.kind == "measured":
        if provenance.device not in (None, device):
            yield Finding(table, row, "error", f"it was measured on {provenance.device}, not on {device}")
        if provenance.gain is not None and provenance.gain < -TOLERATED_LOSS:
            yield Finding(
                table, row, "error", f"it was measured as {-provenance.gain:.1%} slower than vLLM's default; remove it"
            )


def reach_findings(table: Path, rows: Iterable[int]) -> Iterator[Finding]:
    """Rows that are used for much larger steps, since no other row is nearer."""
    ordered = sorted(rows)
    for row, following in itertools.pairwise(ordered):
        farthest = (row + following) // 2
        if farthest > _FARTHEST * row:
            yield Finding(
                table,
                row,
                "error",
                f"it is the nearest row, and so used, for steps of up to {farthest} tokens; "
                f"add rows between {row} and {following}",
            )


def spans(rows: Mapping[int, object], up_to: int) -> dict[int, tuple[int, int]]:
    """For each row, the smallest and largest step up to `up_to` that uses it; of two equally near rows the smaller."""
    ordered = sorted(rows)
    found: dict[int, tuple[int, int]] = {}
    start = 1
    for row, following in zip(ordered, [*ordered[1:], None], strict=True):
        end = max(up_to, row) if following is None else (row + following) // 2
        found[row] = (start, end)
        start = end + 1
    return found
