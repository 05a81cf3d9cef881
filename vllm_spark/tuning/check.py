"""Checks tuned tables without a GPU: all of a folder, those that come with this project and the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_spark.errors import ConfigurationError
from vllm_spark.tuning import fused_moe_compile, fused_moe_table, marlin_table
from vllm_spark.tuning.check_fused_moe import check_fused_moe_table
from vllm_spark.tuning.check_marlin import check_marlin_table
from vllm_spark.tuning.finding import Finding
from vllm_spark.tuning.fused_moe_table import PROVENANCE_SUFFIX


@dataclass(frozen=True)
class CheckReport:
    """What was checked, and what was found.

    Attributes:
        tables: every table that was looked at.
        findings: errors and notes, in the order of the tables.
        compiler: the Triton by which kernels were compiled; None if they were not.
        unchecked: what could not be checked here and why; empty if all was.
    """

    tables: tuple[Path, ...]
    findings: tuple[Finding, ...]
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
        ConfigurationError: one is no folder.
    """
    tables: list[Path] = []
    findings: list[Finding] = []
    missing = "it was not asked for" if not compile_kernels else fused_moe_compile.unavailable()
    compile_row = fused_moe_compile.compile_row if missing is None else None
    source = fused_moe_compile.kernel_source()
    vllm_tables = None if source is None else source.parent / "configs"
    compiled = False
    for folder in folders:
        for path in _tables(folder):
            tables.append(path)
            if path.name.endswith(PROVENANCE_SUFFIX):
                findings += _check_orphan(path)
            elif path.name.startswith("kernel="):
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
    version = fused_moe_compile.triton_version() if compile_row is not None and compiled else None
    listed = tuple(path for path in tables if not path.name.endswith(PROVENANCE_SUFFIX))
    return CheckReport(listed, tuple(findings), version, tuple(unchecked))


def _tables(folder: Path) -> Iterator[Path]:
    """Every file that is, or is meant to be, a table or its provenance."""
    if not folder.is_dir():
        raise ConfigurationError(f"{folder} is no folder; give one that has tables in it")
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith(("E=", "kernel=")):
            yield path
    for name in (marlin_table.FOLDER, fused_moe_table.FOLDER):
        yield from sorted((folder / name).glob("*.json"))


def _check_orphan(path: Path) -> Iterator[Finding]:
    table = path.with_name(path.name.removesuffix(PROVENANCE_SUFFIX) + ".json")
    if not table.is_file():
        yield Finding(path, None, "error", f"it is the provenance of {table.name}, which is not there")


def _duplicates(tables: Sequence[Path]) -> Iterator[Finding]:
    """Two tables of one name in a folder and its own folders: which one counts is nowhere written."""
    first: dict[tuple[str, Path], Path] = {}
    for path in tables:
        folder = path.parent
        root = folder.parent if folder.name in (marlin_table.FOLDER, fused_moe_table.FOLDER) else folder
        other = first.setdefault((path.name, root), path)
        if other != path:
            yield Finding(
                path, None, "error", f"there is another one for the same in {other.parent}; remove one of them"
            )
