"""What a tuner has measured so far, line by line, so that a search that is interrupted goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ValidationError

from vllm_spark.errors import ConfigurationError
from vllm_spark.tuning.outcome import Outcome, Shape

FILE = "journal.jsonl"


class _Line(BaseModel):
    """One outcome, and with what it was measured: another driver or vLLM measures anew."""

    device: str
    versions: dict[str, str]
    outcome: Outcome


class Journal:
    """The journal of a folder of tables.

    Args:
        folder: made if need be.
        device: on which is measured, as in file names.
        versions: of what it is measured with; lines of others are kept and not used.

    Raises:
        ConfigurationError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, device: str, versions: Mapping[str, str]):
        self._path = folder / FILE
        self._device, self._versions = device, dict(versions)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab+") as file:
                # A line that was cut off must not take the next one with it.
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read() != b"\n":
                        file.write(b"\n")
        except OSError as error:
            raise ConfigurationError(
                f"the folder {folder} cannot be written ({error.strerror}); give another with --out"
            ) from None

    def known(self) -> dict[tuple[Shape, int], Outcome]:
        """Outcomes of this device and these versions by shape and rows; the newest of each.

        A line that was cut off when the machine lost its power is passed over.
        """
        found: dict[tuple[Shape, int], Outcome] = {}
        for text in self._path.read_text().splitlines():
            try:
                line = _Line.model_validate_json(text)
            except ValidationError:
                continue
            if (line.device, line.versions) == (self._device, self._versions):
                found[line.outcome.shape, line.outcome.rows] = line.outcome
        return found

    def add(self, outcome: Outcome) -> None:
        """Writes it down, and waits until the disk has it."""
        line = _Line(device=self._device, versions=self._versions, outcome=outcome)
        with self._path.open("a") as file:
            file.write(line.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
