"""Finds the table of a kernel's shape: first in the user's folder, then in this project's.

Files are read once for an engine. A file or folder that cannot be read is skipped with a warning.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from vllm_spark.errors import ConfigurationError
from vllm_spark.files import configs_folder, configuration_folder
from vllm_spark.kernels.fused_moe import table as fused_moe
from vllm_spark.kernels.fused_moe.table import (
    FusedMoeProvenance,
    FusedMoeShape,
    load_fused_moe_provenance,
    load_fused_moe_table,
)
from vllm_spark.kernels.marlin import table as marlin
from vllm_spark.kernels.marlin.table import MarlinShape, MarlinTable, load_marlin_table

logger = logging.getLogger("vllm_spark")


def user_folder() -> Path | None:
    """Where `vllm-spark tune` writes this user's tables; None for a user without a home folder."""
    folder = configuration_folder()
    return None if folder is None else folder / "tuned"


def shipped_folder() -> Path:
    """The folder of the tables that come with this project."""
    return configs_folder()


@functools.cache
def find_marlin_table(device: str, shape: MarlinShape) -> tuple[Path, MarlinTable] | None:
    """Path and content of the table for `shape`; None if there is no usable one.

    Args:
        device: as in `devices.device_file_name`.
    """
    for folder in folders():
        path = folder / marlin.FOLDER / shape.file_name(device)
        if not _is_there(path):
            continue
        try:
            table = load_marlin_table(path)
            if (table.device, table.shape) != (device, shape):
                raise ConfigurationError(f"the Marlin table {path} is for another shape or device than its name")
        except ConfigurationError as error:
            logger.warning("Ignoring a tuned table: %s.", error)
            continue
        return path, table
    return None


def marlin_tables_for_experts(device: str) -> list[MarlinTable]:
    """Tables of Marlin's kernel for experts that serving would use on `device` and that change a call."""
    found: dict[MarlinShape, MarlinTable] = {}
    for path in table_files(device, marlin.FOLDER):
        if path.name.startswith("kernel=moe_") and (used := _table_of_file(device, path)) is not None:
            found[used.shape] = used
    return [table for table in found.values() if table.effective_rows]


def _table_of_file(device: str, path: Path) -> MarlinTable | None:
    """The table that serving uses for the shape in the name of `path`: this one, or the one in an earlier folder."""
    try:
        shape = load_marlin_table(path).shape
    except ConfigurationError as error:
        logger.warning("Ignoring a tuned table: %s.", error)
        return None
    used = find_marlin_table(device, shape)
    return None if used is None else used[1]


def table_files(device: str, kind: str) -> list[Path]:
    """Files that may be tables for `device`, the user's own first.

    Args:
        device: as in `devices.device_file_name`.
        kind: their folder's name.
    """
    found: list[Path] = []
    for folder in folders():
        try:
            files = sorted((folder / kind).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            logger.warning("Ignoring tuned tables: %s cannot be read (%s).", folder / kind, error.strerror)
            continue
        found += [
            path
            for path in files
            if f"device_name={device}," in path.name or path.name.endswith(f"device_name={device}.json")
        ]
    return [path for path in found if path.suffix == ".json" and not path.name.endswith(fused_moe.PROVENANCE_SUFFIX)]


@functools.cache
def find_fused_moe_table(
    device: str, experts: int, size_n: int, dtype: str | None, block_shape: tuple[int, int] | None
) -> tuple[Path, dict[int, dict[str, int]], FusedMoeProvenance] | None:
    """Path, rows and provenance of the table for a shape; None if there is no usable one.

    Args:
        device: as in `devices.device_file_name`.
        experts: of this rank.
        size_n: an expert's intermediate width on this rank.
        dtype: vLLM's name of the format, as in its file names; None for bfloat16 and float16.
        block_shape: of weights that share a scale, if they do in blocks.
    """
    name = FusedMoeShape(experts, size_n, dtype, block_shape).file_name(device)
    for folder in folders():
        path = folder / fused_moe.FOLDER / name
        if not _is_there(path):
            continue
        try:
            table = load_fused_moe_table(path)
            provenance = load_fused_moe_provenance(path)
        except ConfigurationError as error:
            logger.warning("Ignoring a tuned table: %s.", error)
            continue
        return path, dict(table.rows), provenance or FusedMoeProvenance()
    return None


def clear_cache() -> None:
    """Makes the next look-up read the files again."""
    find_marlin_table.cache_clear()
    find_fused_moe_table.cache_clear()


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        logger.warning("Ignoring a tuned table: %s cannot be read (%s).", path, error.strerror)
        return False


def folders() -> list[Path]:
    """The folders that are searched for tables, in this order."""
    mine = user_folder()
    return [shipped_folder()] if mine is None else [mine, shipped_folder()]
