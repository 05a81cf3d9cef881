"""Tables of vLLM's FusedMoE kernels (Triton) in vLLM's own format, and a second file with the provenance of each row.

vLLM's file maps numbers of tokens to the kernel's parameters and allows no other keys than `triton_version`, so
provenance is in `<name>.provenance.json`.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt

from vllm_spark.files import atomic_write_text
from vllm_spark.kernels.table import (
    LARGEST_ROW,
    VLLM_DEFAULT,
    Provenance,
    explained,
    is_row_number,
    read_json,
    row_numbers,
)

FOLDER = "fused_moe"
"""Folder of these tables, in `configs/` and in a user's folder of tuned tables."""

PROVENANCE_SUFFIX = ".provenance.json"

_FILE_NAME = re.compile(
    r"E=(?P<experts>[1-9]\d*),N=(?P<size_n>[1-9]\d*),device_name=(?P<device>[^,=]+)"
    r"(?:,dtype=(?P<dtype>[a-z0-9_]+))?(?:,block_shape=\[(?P<block_n>\d+),(?P<block_k>\d+)\])?\.json"
)


@dataclass(frozen=True)
class FusedMoeShape:
    """The shape that a table is for.

    Attributes:
        experts: of this rank.
        size_n: an expert's intermediate width on this rank.
        dtype: vLLM's name: `fp8_w8a8`, `int4_w4a16`, `int8_w8a16`; None for bfloat16 and float16.
        block_shape: of weights that share a scale, if they do in blocks.
    """

    experts: int
    size_n: int
    dtype: str | None = None
    block_shape: tuple[int, int] | None = None

    def file_name(self, device: str) -> str:
        """vLLM's name of the table's file; `device` as in `devices.device_file_name`."""
        dtype = f",dtype={self.dtype}" if self.dtype else ""
        block = f",block_shape=[{self.block_shape[0]},{self.block_shape[1]}]" if self.block_shape else ""
        return f"E={self.experts},N={self.size_n},device_name={device}{dtype}{block}.json"


def read_file_name(name: str) -> tuple[FusedMoeShape, str] | None:
    """Shape and device in a file's name; None if it is not the name of a table."""
    found = _FILE_NAME.fullmatch(name)
    if found is None:
        return None
    block = (int(found["block_n"]), int(found["block_k"])) if found["block_n"] else None
    return FusedMoeShape(int(found["experts"]), int(found["size_n"]), found["dtype"], block), found["device"]


@dataclass(frozen=True)
class FusedMoeTable:
    """Rows of a table: numbers of tokens, and the kernel's parameters for each (`BLOCK_SIZE_M` and so on)."""

    rows: Mapping[int, dict[str, int]]
    triton_version: str | None = None

    def row(self, tokens: int) -> dict[str, int]:
        """The row that vLLM uses for a step of `tokens`: the nearest key, of two the first in the file."""
        return self.rows[min(self.rows, key=lambda known: abs(known - tokens))]


class FusedMoeProvenance(BaseModel):
    """The provenance file of a table.

    Attributes:
        models: for people: whose layers have this shape, at which tensor-parallel size.
        rows: provenance for each key of the table.
        group_size: of 4-bit weights, for which the table is meant; not in its name.
        hidden: width of the model whose experts were measured, if only one was; not in the name.
        top_k: experts of a token there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: tuple[str, ...] = ()
    group_size: StrictInt | None = Field(default=None, gt=0)
    hidden: StrictInt | None = Field(default=None, gt=0)
    top_k: StrictInt | None = Field(default=None, gt=0)
    rows: Annotated[dict[int, Provenance], BeforeValidator(row_numbers)] = Field(default_factory=dict)

    @property
    def is_all_default(self) -> bool:
        """Whether every row is vLLM's own default: a table that comes with vLLM takes precedence."""
        return bool(self.rows) and all(row.rule == VLLM_DEFAULT for row in self.rows.values())


def provenance_path(table: Path) -> Path:
    """The path of a table's provenance file."""
    return table.with_name(table.name.removesuffix(".json") + PROVENANCE_SUFFIX)


def load_fused_moe_table(path: Path) -> FusedMoeTable:
    """The table in `path`, in the order of the file.

    Raises:
        ConfigurationError: it cannot be read, or vLLM could not use it; the message names the file and the fault.
    """
    with explained(path, "FusedMoE table"):
        return _checked_table(read_json(path))


def load_fused_moe_provenance(table: Path) -> FusedMoeProvenance | None:
    """The provenance of the rows of `table`; None if there is no such file.

    Raises:
        ConfigurationError: there is one, and it cannot be read or holds something else.
    """
    path = provenance_path(table)
    with explained(path, "provenance file"):
        try:
            return FusedMoeProvenance.model_validate(read_json(path))
        except FileNotFoundError:
            return None


def store_fused_moe_table(
    shape: FusedMoeShape, device: str, table: FusedMoeTable, provenance: FusedMoeProvenance, folder: Path
) -> Path:
    """Writes table and provenance into `folder`, which is created if needed, and returns the table's path.

    The provenance is written first, so that no table is ever without one.

    Raises:
        ConfigurationError: they cannot be written.
    """
    path = folder / shape.file_name(device)
    noted = provenance.model_copy(update={"rows": dict(sorted(provenance.rows.items()))})
    atomic_write_text(provenance_path(path), noted.model_dump_json(indent=2, exclude_defaults=True) + "\n", "table")
    content: dict[str, Any] = {"triton_version": table.triton_version} if table.triton_version else {}
    content |= {str(tokens): table.rows[tokens] for tokens in sorted(table.rows)}
    atomic_write_text(path, json.dumps(content, indent=2) + "\n", "table")
    return path


def _checked_table(content: dict[str, Any]) -> FusedMoeTable:
    """Raises ValueError for what vLLM could not use."""
    version = content.pop("triton_version", None)
    rows: dict[int, dict[str, int]] = {}
    for key, values in content.items():
        if not is_row_number(key):
            raise ValueError(f"{reprlib.repr(key)} is not a number of tokens from 1 to {LARGEST_ROW}")
        if not isinstance(values, dict) or not all(
            type(value) is int and abs(value) < 2**31 for value in values.values()
        ):
            raise ValueError(f"row {key} must map names to 32-bit whole numbers")
        rows[int(key)] = values
    if not rows:
        raise ValueError("it has no rows")
    if version is not None and not isinstance(version, str):
        raise ValueError(f"triton_version is {version!r}, not text")
    return FusedMoeTable(rows, version)
