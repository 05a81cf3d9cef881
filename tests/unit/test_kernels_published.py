"""Sets of parameters that others measured on a GB10: their tables, what is left out of them, and broken files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vllm_spark.errors import ConfigurationError
from vllm_spark.files import configs_folder
from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.fused_moe.check import check_fused_moe_table, shared_bytes
from vllm_spark.kernels.fused_moe.published import (
    PublishedRow,
    PublishedSet,
    load_published_set,
    published_sets,
    published_table,
    sets_left_out,
)
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, vllm_row
from vllm_spark.kernels.fused_moe.table import FusedMoeProvenance, store_fused_moe_table
from vllm_spark.kernels.fused_moe.vllm_rows import effective_rows, outdated_rows, refreshed_rows
from vllm_spark.kernels.table import Provenance, origins
from vllm_spark.tune.fused_moe import published as writer

from .tuning_outcomes import BF16, FP8_BLOCK, INT4

SETS = published_sets(configs_folder())
ROW: dict[str, Any] = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 32,
    "BLOCK_SIZE_K": 128,
    "num_warps": 4,
    "num_stages": 4,
}


def a_set(shape: FusedMoeExperts, rows: tuple[int, ...], vllm: tuple[int, ...] = ()) -> PublishedSet:
    return PublishedSet.model_validate(
        {
            "source": "a/b 1234567",
            "page": "a file",
            "grade": "A",
            "device": GB10.name,
            "date": "2026-10-01",
            "measured": "times",
            "shape": shape.model_dump(),
            "models": ["a model TP=2"],
            "rows": {str(tokens): {**ROW, "gain": 0.05} for tokens in rows},
            "vllm": vllm,
        }
    )


@pytest.mark.parametrize("shape", [BF16, FP8_BLOCK], ids=["bf16", "fp8"])
def test_steps_take_the_nearest_row_of_a_set_and_vllms_choice_elsewhere(shape: FusedMoeExperts) -> None:
    table, provenance = published_table(a_set(shape, (4, 8, 32), vllm=(16,)), {"vllm": "0.32.0"})
    for tokens in (*range(1, 80), 500, 1024, 8192):
        tuned = tokens in range(4, 13) or tokens in range(25, 33)
        expected = {**ROW, "GROUP_SIZE_M": 1, "SPLIT_K": 1} if tuned else vllm_row(shape, GB10.name, tokens)
        assert table.row(tokens) == expected, tokens
    published = [tokens for tokens, row in provenance.rows.items() if row.grade == "A"]
    assert published == [*range(4, 13), *range(25, 33)]
    assert all(provenance.rows[tokens].gain == 0.05 for tokens in published)
    assert set(table.rows) == set(provenance.rows)


def test_int4_rows_are_those_of_the_set(tmp_path: Path) -> None:
    """vLLM completes its own choice, so those rows have no tile; each version may use them."""
    made = a_set(INT4, (4, 8, 32), vllm=(16,))
    table, provenance = published_table(made, {"vllm": "0.32.0"})
    for tokens, tuned in ((1, False), (3, False), (4, True), (12, True), (16, False), (20, False), (32, True)):
        assert ("BLOCK_SIZE_N" in table.row(tokens)) == tuned, tokens
    for tokens in (33, 64, 96, 97, 1024, 5000):
        assert table.row(tokens) == vllm_row(INT4, GB10.name, tokens), tokens
    assert provenance.group_size == 128
    assert outdated_rows(provenance, "0.26.0") == {}
    path = store_fused_moe_table(made.shape.table, made.device, table, provenance, tmp_path)
    assert [each for each in check_fused_moe_table(path, None, None) if each.kind == "error"] == []


def test_another_vllm_replaces_the_rows_of_its_own_choice() -> None:
    made = a_set(FP8_BLOCK, (4, 8), vllm=())
    table, provenance = published_table(made, {"vllm": "0.1"})
    outdated = outdated_rows(provenance, "0.32.0")
    assert set(outdated) == set(table.rows) - {*range(4, 9)}
    now = refreshed_rows(table.rows, outdated, made.shape.table, GB10.name)
    assert now is not None
    assert {tokens: now[tokens] for tokens in range(4, 9)} == {tokens: table.rows[tokens] for tokens in range(4, 9)}


@pytest.mark.parametrize("name", SETS)
def test_a_shipped_set(name: str) -> None:
    """What serving relies on, besides the check of its table."""
    published = SETS[name]
    table, provenance = published_table(published, {"vllm": "0.32.0"})
    effective = effective_rows(table.rows, provenance, published.shape.table, published.device)
    assert set(published.rows) <= set(effective), "each row differs from vLLM's choice"
    assert set(effective) == {tokens for tokens, row in provenance.rows.items() if row.grade == "A"}
    for row in published.rows.values():
        needed = shared_bytes(published.shape.table, row.parameters())
        assert needed is not None
        assert needed <= GB10.shared_bytes
    assert re.search(r"[0-9a-f]{7}", published.source), "a commit"
    assert published.machine
    assert published.versions


def test_vllms_table_for_a_gb10_keeps_all_rows_but_one() -> None:
    """The row for one token took 22 % longer than the tile of vLLM's default."""
    for experts in (256, 512):
        published = SETS[f"gb10-fp8-block-e{experts}-n512"]
        table, _ = published_table(published, {"vllm": "0.32.0"})
        for tokens in (2, 4, 8, 16, 100, 2048):
            assert table.row(tokens) == vllm_row(published.shape, GB10.name, tokens)
        assert table.row(1)["BLOCK_SIZE_N"] == 64


def test_sets_that_are_left_out_are_named_with_a_reason_in_the_documentation() -> None:
    left_out = sets_left_out(configs_folder())
    assert {each.grade for each in left_out} == {"A", "B", "C", "X"}
    text = " ".join((Path(__file__).parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8").split())
    for each in left_out:
        assert each.source in text, each.source
        assert each.reason in text, each.reason
    for published in SETS.values():
        assert published.source in text, published.source


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": ""}, "source"),
        ({"grade": "C"}, "grade"),
        ({"rows": {}}, "rows"),
        ({"rows": {"01": ROW}}, "'01' is not a number of tokens"),
        ({"rows": {"1": {**ROW, "BLOCK_SIZE_M": 0}}}, "rows.1.BLOCK_SIZE_M"),
        ({"rows": {"1": {**ROW, "speed": 2}}}, "rows.1.speed"),
        ({"shape": {"experts": 1}}, "shape.top_k"),
        ({"more": 1}, "more"),
    ],
)
def test_one_sentence_for_a_broken_set(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    content = json.loads(a_set(BF16, (1,)).model_dump_json()) | change
    path = tmp_path / "set.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError) as caught:
        load_published_set(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_set_that_says_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {key: value for key, value in vllm_row(BF16, GB10.name, 1).items() if key != "SPLIT_K"}
    made = a_set(BF16, (1,)).model_copy(update={"rows": {1: PublishedRow.model_validate(own)}})
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "nothing.json").write_text(made.model_dump_json())
    with pytest.raises(ConfigurationError, match="each row of the published set nothing is what vLLM"):
        writer.write_tables(tmp_path, tmp_path)
    monkeypatch.setattr(writer, "installed_vllm", lambda: None)
    with pytest.raises(ConfigurationError, match="is not installed"):
        writer.write_tables(tmp_path, tmp_path)


def test_origins_in_words() -> None:
    published = Provenance(kind="published", source="a/b 1", grade="A")
    measured = Provenance(kind="measured", device=GB10.name)
    guess = Provenance(kind="derived", rule="a rule")
    assert origins([]) == "no tuned row"
    assert origins([guess]) == "1 row derived (a rule)"
    assert origins([published, published, guess, measured, None]) == (
        "2 rows published by a/b 1 (grade A); 1 derived (a rule); 1 measured on NVIDIA_GB10; 1 of unknown origin"
    )


def test_rows_that_the_kernel_runs_alike_have_no_effect() -> None:
    """It reduces BLOCK_SIZE_K to the block of the weights."""
    own = vllm_row(FP8_BLOCK, GB10.name, 1)
    same = {key: value for key, value in own.items() if key != "SPLIT_K"} | {"BLOCK_SIZE_K": 256}
    tuned = FusedMoeProvenance(rows={1: Provenance(kind="published", source="x")})
    assert effective_rows({1: same, 2: own}, tuned, FP8_BLOCK.table, GB10.name) == [2], "of unknown origin"
    assert effective_rows({1: same | {"num_warps": 8}}, tuned, FP8_BLOCK.table, GB10.name) == [1]
