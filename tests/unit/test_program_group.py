"""The programs that a subcommand starts: the logs of its failures."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from vllm_spark.errors import SparkError
from vllm_spark.processes.group import MAX_KEPT_LOGS, process_group


def fail(console: Console) -> None:
    with (
        pytest.raises(SparkError),
        process_group("test", console) as group,
        group.started("a program", [sys.executable, "-c", "print(1)"], "a.log"),
    ):
        raise SparkError("it failed")


def test_logs_of_old_failures_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder that all users share, only this user's folders of this subcommand."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    console = Console(file=(tmp_path / "out").open("w"))
    prefix = "vllm-spark-test-logs-"
    for number in range(MAX_KEPT_LOGS + 3):
        folder = tmp_path / f"{prefix}{number}"
        (folder / "logs").mkdir(parents=True)
        os.utime(folder, (number, number))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    linked, other = tmp_path / f"{prefix}link", tmp_path / "vllm-spark-demo-logs-1"
    linked.symlink_to(elsewhere)
    other.mkdir()
    fail(console)
    left = {folder.name for folder in tmp_path.glob(f"{prefix}*") if not folder.is_symlink()}
    assert len(left) == MAX_KEPT_LOGS
    assert {f"{prefix}{number}" for number in range(4, MAX_KEPT_LOGS + 3)} < left
    assert linked.is_symlink()
    assert elsewhere.is_dir()
    assert other.is_dir()
