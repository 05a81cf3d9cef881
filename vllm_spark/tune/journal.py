"""The journal of a search: one JSON line for each result, so that an interrupted search can be continued.

A line holds the device and the versions that it was measured with. Lines of another device or of other versions are
ignored. A line that is incomplete, for example after a power failure, is ignored too.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ValidationError

from vllm_spark import __version__
from vllm_spark.errors import ConfigurationError, SparkError
from vllm_spark.files import JOURNAL_FILE, open_regular, read_regular
from vllm_spark.kernels.fused_moe.shapes import FusedMoeParameters
from vllm_spark.kernels.marlin.table import MarlinParameters
from vllm_spark.tune.results import Outcome, Shape

FILE = "journal.jsonl"


Parameters = MarlinParameters | FusedMoeParameters
"""Of any kernel."""


class _Line(BaseModel):
    """One line, with the device and the versions that it was measured with."""

    device: str
    versions: dict[str, str]


class _OutcomeLine(_Line):
    outcome: Outcome
    stage: Literal["searched", "kept"] = "searched"
    models: tuple[str, ...] = ()


class _HangLine(_Line):
    """Parameters with which a kernel hangs."""

    hung: Parameters
    shape: Shape


_AnyLine = TypeVar("_AnyLine", bound=_Line)


@dataclass(frozen=True)
class Kept:
    """An entry of a table: the outcome (perhaps with the default as its winner), and the models that it is for."""

    outcome: Outcome
    models: tuple[str, ...]


class Journal:
    """The journal of a folder of tables.

    Args:
        folder: created if needed.
        device: that is measured, as in file names.
        versions: of the software; lines of other versions are kept and ignored.

    Raises:
        ConfigurationError: the folder cannot be made, or the journal cannot be written or is not a regular file.
    """

    def __init__(self, folder: Path, device: str, versions: Mapping[str, str]):
        self._path = folder / FILE
        self._device, self._versions = device, dict(versions)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._check_regular()
            with self._path.open("ab+") as file:
                # A line that was cut off must not swallow the next one.
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read() != b"\n":
                        file.write(b"\n")
        except OSError as error:
            raise ConfigurationError(
                f"the folder {folder} cannot be written ({error.strerror}); give another with --output"
            ) from None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Locks the journal against other tuners.

        Raises:
            SparkError: another tuner holds the lock.
        """
        with self._path.open("ab") as file:
            with suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise SparkError(
                        f"another vllm-spark tune is running in {self._path.parent}; wait for it, or stop it"
                    ) from None
            yield

    def known(self) -> dict[tuple[Shape, int], Outcome]:
        """Outcomes of this device and these versions by shape and rows; the newest of each.

        Raises:
            ConfigurationError: the journal cannot be read.
        """
        lines = self._lines(_OutcomeLine)
        return {(line.outcome.shape, line.outcome.rows): line.outcome for line in lines if line.stage == "searched"}

    def kept(self) -> dict[tuple[Shape, int], Kept]:
        """Entries of tables of this device and these versions by shape and rows; the newest of each.

        Raises:
            ConfigurationError: the journal cannot be read.
        """
        found: dict[tuple[Shape, int], Kept] = {}
        for line in self._lines(_OutcomeLine):
            if line.stage == "kept":
                key = (line.outcome.shape, line.outcome.rows)
                before = found[key].models if key in found else ()
                found[key] = Kept(line.outcome, tuple(dict.fromkeys((*before, *line.models))))
        return found

    def hung(self) -> set[Parameters]:
        """Parameters with which a kernel hung, for any shape, on this device with these versions.

        Raises:
            ConfigurationError: the journal cannot be read.
        """
        return {line.hung for line in self._lines(_HangLine)}

    def _lines(self, kind: type[_AnyLine]) -> Iterator[_AnyLine]:
        """The valid lines of one kind of this device and these versions."""
        try:
            content = read_regular(self._path, JOURNAL_FILE)
        except OSError as error:
            raise ConfigurationError(
                f"the journal {self._path} cannot be read ({error.strerror}); remove it, or give another with --output"
            ) from None
        for text in content.splitlines():
            try:
                line = kind.model_validate_json(text)
            except ValidationError:
                continue
            if (line.device, line.versions) == (self._device, self._versions):
                yield line

    def _check_regular(self) -> None:
        """Opening a pipe for writing would wait for a reader, and a device could be read without end."""
        try:
            open_regular(self._path).close()
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigurationError(
                f"the journal {self._path} cannot be read ({error.strerror}); remove it, or give another folder with "
                "--output"
            ) from None

    def add(self, outcome: Outcome) -> None:
        """Appends the outcome of a search, and syncs the file.

        Raises:
            SparkError: the file cannot be written, for example since the disk is full.
        """
        self._write([_OutcomeLine(device=self._device, versions=self._versions, outcome=outcome)])

    def add_hang(self, shape: Shape, parameters: Parameters) -> None:
        """Appends parameters with which a kernel hangs, and syncs the file.

        Raises:
            SparkError: the file cannot be written, for example since the disk is full.
        """
        self._write([_HangLine(device=self._device, versions=self._versions, hung=parameters, shape=shape)])

    def add_kept(self, kept: Sequence[Kept]) -> None:
        """Appends entries of tables, and syncs the file.

        Raises:
            SparkError: the file cannot be written, for example since the disk is full.
        """
        self._write(
            _OutcomeLine(
                device=self._device, versions=self._versions, outcome=each.outcome, stage="kept", models=each.models
            )
            for each in kept
        )

    def _write(self, lines: Iterable[_Line]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(line.model_dump_json() + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SparkError(
                f"the journal {self._path} cannot be written ({error.strerror}); make room there, or give "
                "another folder with --output"
            ) from None


def installed_versions() -> dict[str, str]:
    """Versions of vLLM, torch, Triton, this project and, if there is one, NVIDIA's driver.

    They are read from the packages' modules, since some are distributed under other names.
    """
    import torch
    import triton
    import vllm

    versions = {
        "vllm": str(vllm.__version__),
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "vllm_spark": __version__,
    }
    driver = _driver_version()
    return versions if driver is None else {**versions, "driver": driver}


def _driver_version() -> str | None:
    from vllm.third_party import pynvml

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            version = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
        return version.decode() if isinstance(version, bytes) else str(version)
    return None
