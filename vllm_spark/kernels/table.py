"""What tables of all kernels have in common: the provenance of an entry, and strict reading of their JSON files.

Reading is strict in two ways: no key occurs twice, and a number of tokens has one spelling.
"""

from __future__ import annotations

import datetime
import json
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_spark.errors import ConfigurationError
from vllm_spark.files import TABLE_FILE, read_regular
from vllm_spark.records import first_fault

VLLM_DEFAULT = "vllm-default"
"""The rule of entries that leave the choice to vLLM, since nothing better was measured."""

LARGEST_ROW = 2**20
"""Largest number of tokens of a row: more than any engine's step has, and few enough to iterate over."""


class Provenance(BaseModel):
    """Where one entry comes from. Each kind requires some of the fields (`missing_fields`).

    A table without them still loads: serving needs only the parameters, and `vllm-spark tune --check` reports them.

    Attributes:
        kind: `measured` here by the tuner, `published` by others, or `derived` by a rule.
        device: on which it was measured, as in file names (`NVIDIA_GB10`).
        date: of the measurement or publication.
        versions: of what it was measured with, for instance {"vllm": "0.33.0", "triton": "3.8.0"}.
        gain: share of the default's time that is saved, 0.05 for 5 % less; negative where it is slower.
        source: where it was published.
        grade: of the published evidence: `A` measured on this device with a baseline, raw data or a second measurement,
            `B` tuned there without one.
        rule: by which it was derived; `vllm-default` where the choice stays vLLM's.
        note: anything else, for people.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["measured", "published", "derived"]
    device: str | None = None
    date: datetime.date | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    gain: float | None = Field(default=None, allow_inf_nan=False)
    source: str | None = None
    grade: Literal["A", "B"] | None = None
    rule: str | None = None
    note: str | None = None

    def missing_fields(self) -> list[str]:
        """Names of the fields that its kind needs and that are empty."""
        needed = {
            "measured": ("device", "date", "versions", "gain"),
            "published": ("source",),
            "derived": ("rule",),
        }[self.kind]
        gaps = [name for name in needed if getattr(self, name) in (None, "", {})]
        if self.kind == "measured" and self.versions and "vllm" not in self.versions:
            gaps.append("versions.vllm")
        return gaps


def origins(rows: Iterable[Provenance | None]) -> str:
    """How many rows come from where: `6 rows published by a/b 1234567 (grade A); 2 derived (a rule)`.

    For the log and for `vllm-spark tune --check`; rows with vLLM's own choice are not to be among them.
    """
    counts: Counter[str] = Counter(_origin(row) for row in rows)
    if not counts:
        return "no tuned row"
    words = [f"{number} {kind}" for kind, number in counts.items()]
    first, *others = words
    number, _, kind = first.partition(" ")
    return "; ".join([f"{number} row{'s' if number != '1' else ''} {kind}", *others])


def _origin(row: Provenance | None) -> str:
    if row is None:
        return "of unknown origin"
    if row.kind == "published":
        grade = "" if row.grade is None else f" (grade {row.grade})"
        return f"published by {row.source or 'an unnamed source'}{grade}"
    if row.kind == "measured":
        return f"measured on {row.device or 'an unnamed device'}"
    return f"derived ({row.rule or 'no rule named'})"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else, or a key twice.
    """
    try:
        content = json.loads(read_regular(path, TABLE_FILE), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it does not hold a JSON object")
    return content


@contextmanager
def explained(path: Path, what: str) -> Iterator[None]:
    """Gives errors of reading and checking a file a sentence.

    Args:
        path: the file that the body reads.
        what: what it is to be, such as `Marlin table`.

    Raises:
        ConfigurationError: the body raised OSError, pydantic's ValidationError, or another ValueError.
    """
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"the {what} {path} cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise ConfigurationError(f"{path} is not a {what}: {first_fault(error)}") from None
    except ValueError as error:
        raise ConfigurationError(f"{path} is not a {what}: {error}") from None


def row_numbers(value: object) -> object:
    """Refuses keys that are not numbers of tokens in their one spelling (not `01`), so that no row occurs twice.

    For pydantic, before a field that maps numbers to rows.
    """
    if isinstance(value, dict):
        for key in value:
            if not is_row_number(str(key)):
                raise ValueError(f"{reprlib.repr(key)} is not a number of tokens from 1 to {LARGEST_ROW}")
    return value


def is_row_number(key: str) -> bool:
    """Whether a key of a JSON object is a number from 1 to `LARGEST_ROW` in its one usual form."""
    usual = key.isascii() and key.isdigit() and not key.startswith("0")
    return usual and len(key) <= len(str(LARGEST_ROW)) and int(key) <= LARGEST_ROW


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} occurs twice, and readers of JSON ignore one of them")
        found[key] = value
    return found
