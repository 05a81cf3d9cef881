"""The program that serves the rows of two GPUs, tried with vLLM's CPU build; whatever fails is in its results."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from pydantic import BaseModel, Field, ValidationError

from benchmarks.servers import Place

from . import on_gpus, report
from .gpu_rows import ROWS
from .on_gpus import EQUAL, FAILED, NOT_RUN, STOCK, Models, Result, message, own_errors, run_row

LONG = 900.0


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """The CPU, with folders for logs."""
    (tmp_path / "logs").mkdir()
    return Place("cpu", tmp_path / "logs", tmp_path / "caches")


def running_below(folder: Path) -> list[str]:
    """The command lines of processes that name a file of the folder."""
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(folder) in line]


def test_a_row_that_takes_too_long_is_ended(place: Place, tmp_path: Path) -> None:
    result = run_row("bfloat16", place, Models(tmp_path), time.monotonic() + LONG, row_seconds=2.0)
    assert (result.outcome, result.result) == (FAILED, "")
    assert set(result.errors) == {"stock", "spark"}
    assert not running_below(tmp_path)


def test_no_row_is_begun_when_the_time_is_over(place: Place, tmp_path: Path) -> None:
    result = run_row("bfloat16", place, Models(tmp_path), time.monotonic(), row_seconds=LONG)
    assert result.outcome == NOT_RUN
    assert not any(place.logs.iterdir())


def test_a_model_that_cannot_be_made(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS["bfloat16"]
    monkeypatch.setitem(ROWS, "unknown", replace(row, served=replace(row.served, model="NoSuchForCausalLM")))
    result = run_row("unknown", place, Models(tmp_path), time.monotonic() + LONG, row_seconds=LONG)
    assert (result.outcome, result.result) == (FAILED, "")
    assert "NoSuchForCausalLM" in result.errors["model"][0]


class SchedulerConfig(BaseModel):
    """As vLLM's, whose errors have several lines."""

    max_num_batched_tokens: int = Field(ge=4)


@pytest.mark.parametrize("prefix", ["", "(EngineCore pid=7) ERROR 01-02 03:04:05 [core.py:8] "])
def test_an_error_of_several_lines_is_recorded_with_its_reason(prefix: str) -> None:
    with pytest.raises(ValidationError) as raised:
        SchedulerConfig(max_num_batched_tokens=1)
    lines = f"Traceback (most recent call last):\npydantic_core.ValidationError: {raised.value}".splitlines()
    log = "".join(f"{prefix}{line}\n" for line in [*lines, "RuntimeError: the engine has failed"])
    result = Result("row", errors={STOCK: ["SparkError: it ended", *own_errors(log)]})
    assert message(result, STOCK) == (
        "pydantic_core.ValidationError: 1 validation error for SchedulerConfig: max_num_batched_tokens: "
        "Input should be greater than or equal to 4"
    )


@pytest.mark.thorough
def test_servers_that_end_while_they_start(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(ROWS["bfloat16"], arguments=("--max-num-batched-tokens", "1"))
    monkeypatch.setitem(ROWS, "refused", row)
    result = run_row("refused", place, Models(tmp_path), time.monotonic() + LONG, row_seconds=LONG)
    assert result.outcome == FAILED
    assert result.result.startswith(f"{report.STOCK_LIMIT}: `")
    assert "max_num_batched_tokens" in result.result
    assert any("max_num_batched_tokens" in line for line in result.errors["spark"])
    assert not running_below(tmp_path)


@pytest.mark.thorough
def test_rows_that_the_cpu_build_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["bfloat16", "sampled_ngram"]
    argv = ["on_gpus", str(tmp_path / "out"), "--device", "cpu", "--only", ",".join(names), "--at-once", "1"]
    monkeypatch.setattr("sys.argv", [*argv, "--seconds", "3600", "--row-seconds", str(LONG), "--steps", "500"])
    monkeypatch.setenv(report.MODELS.variable, "")
    assert on_gpus.main() == 0
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(result["row"], result["outcome"]) for result in results] == [(name, EQUAL) for name in names]
    rows = report.MODELS.read_rows([tmp_path / "out" / "rows.jsonl"])
    assert {row.kind for row in rows} == {report.EQUAL}
    assert len(rows) == len(names)
    assert (tmp_path / "out" / "logs.tar.gz").is_file()
