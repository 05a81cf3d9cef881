"""docs/models.md and docs/features.md are what their rows give, and the rows are what tests recorded."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests import report
from tests.models.report import MODELS, ModelRow, record
from tests.report import Page
from tests.serve.features.report import FEATURES

ROW = ModelRow("0.32.0", "CPU", "equal: 96 tokens", "llama", "LlamaForCausalLM", "float32", "-")


@pytest.mark.parametrize("page", [MODELS, FEATURES], ids=lambda page: page.file.name)
def test_the_page_is_made_of_the_rows(page: Page[Any]) -> None:
    rows = page.read_rows([page.rows])
    assert page.file.read_text(encoding="utf-8") == page.render(rows)
    assert rows


def test_every_architecture_has_a_row_of_the_cpu_build() -> None:
    from tests.models.architectures import ARCHITECTURES

    rows = [row for row in MODELS.read_rows([MODELS.rows]) if row.where == report.CPU]
    recorded = {(row.architecture, row.model_class, row.format) for row in rows if row.speculation == "-"}
    expected = {(name, each.model_class, each.dtype) for name, each in ARCHITECTURES.items()}
    assert expected <= recorded


def test_a_row_is_recorded_with_the_version_of_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    monkeypatch.setenv(MODELS.variable, str(file))
    monkeypatch.setattr(report, "version", lambda name: {"vllm": "0.32.0+cpu"}[name])
    record("llama", "LlamaForCausalLM", "float32", "equal: 96 tokens")
    record("llama", "LlamaForCausalLM", "float32", "equal: 9 tokens", speculation="ngram, 3")
    assert MODELS.read_rows([file]) == [ROW, replace(ROW, speculation="ngram, 3", result="equal: 9 tokens")]


def test_a_later_row_replaces_an_earlier_one(tmp_path: Path) -> None:
    earlier, later = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    earlier.write_text(json.dumps(asdict(ROW)) + "\n")
    rows = [replace(ROW, result="limit: no"), replace(ROW, where="two GPUs")]
    later.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    assert MODELS.read_rows([earlier, later]) == rows


@pytest.mark.parametrize("result", ["", "fine", "Equal: 96 tokens"])
def test_another_result_is_refused(result: str) -> None:
    with pytest.raises(ValueError, match="must begin with 'equal'"):
        record("llama", "LlamaForCausalLM", "float32", result)


def test_cells_do_not_break_the_table() -> None:
    (line,) = MODELS.render([replace(ROW, result="limit: a|b\nc")]).splitlines()[-1:]
    assert line == "| llama | LlamaForCausalLM | float32 | - | 0.32.0 | CPU | limit: a\\|b c |"
