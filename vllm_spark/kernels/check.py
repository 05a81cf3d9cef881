"""Checks the tuned tables in folders, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_spark.errors import ConfigurationError
from vllm_spark.kernels.finding import Finding
from vllm_spark.kernels.fused_moe import compile
from vllm_spark.kernels.fused_moe import table as fused_moe_table
from vllm_spark.kernels.fused_moe.check import check_fused_moe_table
from vllm_spark.kernels.fused_moe.table import (
    PROVENANCE_SUFFIX,
    FusedMoeProvenance,
    load_fused_moe_provenance,
    load_fused_moe_table,
    read_file_name,
)
from vllm_spark.kernels.fused_moe.vllm_rows import effective_rows
from vllm_spark.kernels.marlin import table as marlin_table
from vllm_spark.kernels.marlin.check import check_marlin_table
from vllm_spark.kernels.marlin.table import load_marlin_table
from vllm_spark.kernels.table import Provenance

_FOLDERS = (marlin_table.FOLDER, fused_moe_table.FOLDER)
_NAMES = ("E=", "kernel=")
_NO_NAME = (
    "its name is not the name of a table (kernel=... for Marlin, E=... for FusedMoE), and serving finds tables by "
    "name; rename it or remove it"
)


@dataclass(frozen=True)
class TableContent:
    """The rows of a table by provenance.

    Attributes:
        table: the file.
        tuned: provenance of each row that has an effect.
        default: number of rows with vLLM's own choice.
    """

    table: Path
    tuned: Mapping[int, Provenance | None]
    default: int


@dataclass(frozen=True)
class CheckReport:
    """What was checked, and what was found.

    Attributes:
        tables: every table that was looked at.
        findings: errors and notes, in the order of the tables.
        contents: the rows of each table that could be read, by provenance.
        compiler: version of the Triton that compiled kernels; None if none were compiled.
        unchecked: what could not be checked, and why.
    """

    tables: tuple[Path, ...]
    findings: tuple[Finding, ...]
    contents: tuple[TableContent, ...]
    compiler: str | None
    unchecked: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Whether a table has an error."""
        return any(finding.kind == "error" for finding in self.findings)


def check_tables(folders: Sequence[Path], compile_kernels: bool = True) -> CheckReport:
    """Checks every table in `folders`.

    Args:
        folders: with tables in them, or in their folders `marlin` and `fused_moe`.
        compile_kernels: whether FusedMoE's kernels are compiled, where Triton and vLLM are installed.

    Raises:
        ConfigurationError: one of them is not a folder.
    """
    tables: list[Path] = []
    findings: list[Finding] = []
    missing = "--no-compile was given" if not compile_kernels else compile.unavailable()
    compile_row = compile.compile_row if missing is None else None
    source = compile.kernel_source()
    vllm_tables = None if source is None else source.parent / "configs"
    compiled = False
    for folder in folders:
        files = _tables(folder)
        for path in files:
            tables.append(path)
            if path.name.endswith(PROVENANCE_SUFFIX):
                findings += _check_orphan(path, files)
                continue
            if not path.name.startswith(_NAMES):
                findings.append(Finding(path, None, "error", _NO_NAME))
                continue
            findings += _check_place(path)
            if path.name.startswith("kernel="):
                findings += check_marlin_table(path)
            else:
                compiled = True
                findings += check_fused_moe_table(path, compile_row, vllm_tables)
    findings += _duplicates(tables)
    unchecked = []
    if missing is not None and compiled:
        unchecked.append(
            "no kernel of a FusedMoE table was compiled, so neither spills nor the exact shared memory were checked: "
            + missing
        )
    version = compile.triton_version() if compile_row is not None and compiled else None
    listed = tuple(path for path in tables if not path.name.endswith(PROVENANCE_SUFFIX))
    contents = tuple(content for path in listed if (content := _content(path)) is not None)
    return CheckReport(listed, tuple(findings), contents, version, tuple(unchecked))


def _content(path: Path) -> TableContent | None:
    """None for a file that is not a table, about which there is an error among the findings."""
    try:
        if path.name.startswith("kernel="):
            marlin = load_marlin_table(path)
            tuned = {rows: marlin.rows[rows].provenance for rows in marlin.effective_rows}
            return TableContent(path, tuned, len(marlin.rows) - len(tuned))
        named = read_file_name(path.name)
        if named is None:
            return None
        table = load_fused_moe_table(path)
        provenance = load_fused_moe_provenance(path) or FusedMoeProvenance()
    except ConfigurationError:
        return None
    tuned = {rows: provenance.rows.get(rows) for rows in effective_rows(table.rows, provenance, *named)}
    return TableContent(path, tuned, len(table.rows) - len(tuned))


def _tables(folder: Path) -> list[Path]:
    """Every file whose name is that of a table or of its provenance."""
    try:
        found = [path for path in _files(folder) if path.name.startswith(_NAMES)]
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigurationError(f"{folder} is not a folder; give one that has tables in it") from None
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be read ({error.strerror}); give another folder") from None
    for name in _FOLDERS:
        try:
            found += _files(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ConfigurationError(f"{folder / name} cannot be read ({error.strerror}); make it readable") from None
    return found


def _files(folder: Path) -> list[Path]:
    """JSON files in a folder. Unlike `glob`, raises OSError for a folder that cannot be read."""
    return sorted(path for path in folder.iterdir() if path.name.endswith(".json"))


def _check_place(path: Path) -> Iterator[Finding]:
    """Serving reads each kind of table from a subfolder named after it."""
    own = marlin_table.FOLDER if path.name.startswith("kernel=") else fused_moe_table.FOLDER
    if path.absolute().parent.name in {*_FOLDERS, "configs", "tuned"} - {own}:
        yield Finding(
            path,
            None,
            "error",
            f"serving does not read {path.parent} for such tables; move it to a folder named {own}",
        )
    elif path.absolute().parent.name != own:
        yield Finding(
            path,
            None,
            "note",
            f"serving reads such tables only from a folder named {own} within your folder of tables; move it there",
        )


def _check_orphan(path: Path, files: Sequence[Path]) -> Iterator[Finding]:
    table = path.with_name(path.name.removesuffix(PROVENANCE_SUFFIX) + ".json")
    if table not in files:
        yield Finding(path, None, "error", f"it is the provenance of {table.name}, which does not exist")


def _duplicates(tables: Sequence[Path]) -> Iterator[Finding]:
    """Two tables of one name in a folder and its subfolders: which one is used is undefined."""
    first: dict[tuple[str, Path], Path] = {}
    for path in tables:
        folder = path.parent
        root = folder.parent if folder.name in _FOLDERS else folder
        other = first.setdefault((path.name, root), path)
        if other != path:
            yield Finding(
                path, None, "error", f"there is a second table of this name in {other.parent}; remove one of them"
            )
