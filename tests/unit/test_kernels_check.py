"""`vllm-spark tune --check`: every shipped table passes, and each planted fault is found and named.

Kernels are really compiled for sm_121, by the Triton that comes with vLLM; each distinct one once.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from vllm_spark.cli import main
from vllm_spark.compat.versions import source_version
from vllm_spark.errors import ConfigurationError
from vllm_spark.kernels.check import CheckReport, check_tables
from vllm_spark.kernels.fused_moe.check import check_fused_moe_table, shared_bytes
from vllm_spark.kernels.fused_moe.compile import Compiled, compile_row, kernel_source, unavailable
from vllm_spark.kernels.fused_moe.shapes import default_row
from vllm_spark.kernels.fused_moe.table import (
    FusedMoeProvenance,
    FusedMoeShape,
    FusedMoeTable,
    load_fused_moe_provenance,
    load_fused_moe_table,
    provenance_path,
    store_fused_moe_table,
)
from vllm_spark.kernels.lookup import shipped_folder
from vllm_spark.kernels.marlin.check import _gemm
from vllm_spark.kernels.marlin.table import MarlinRow, MarlinShape, MarlinTable, load_marlin_table, store_marlin_table
from vllm_spark.kernels.table import Provenance
from vllm_spark.models.weights import Int4
from vllm_spark.tune.fused_moe.published import write_tables

from .tuning_outcomes import default_table

DEFAULT = Provenance(kind="derived", rule="vllm-default")
TUNED = Provenance(kind="derived", rule="a test's")
GB10 = "NVIDIA_GB10"
BLOCK = FusedMoeShape(128, 384, "fp8_w8a8", (128, 128))
BF16 = FusedMoeShape(128, 384)
INT4 = FusedMoeShape(128, 384, "int4_w4a16")
SMALL = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 64,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}


def store_fused_moe(
    folder: Path,
    shape: FusedMoeShape,
    tuned: dict[int, dict[str, int]],
    device: str = GB10,
    tuned_is: Provenance | None = None,
) -> Path:
    """A table with rows of our own for few tokens, and vLLM's defaults above."""
    first = max(tuned, default=0) + 1
    above = {key: default_row(shape, key) for key in {first, *default_table(shape).rows} if key >= first}
    table = FusedMoeTable({**tuned, **above})
    rows = {row: (tuned_is or TUNED) if row in tuned else DEFAULT for row in table.rows}
    return store_fused_moe_table(shape, device, table, FusedMoeProvenance(rows=rows), folder / "fused_moe")


def store_int4(folder: Path, row: dict[str, int], group_size: int | None = None) -> Path:
    keys = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    provenance = FusedMoeProvenance(rows=dict.fromkeys(keys, TUNED), group_size=group_size)
    return store_fused_moe_table(INT4, GB10, FusedMoeTable(dict.fromkeys(keys, row)), provenance, folder / "fused_moe")


def store_marlin(folder: Path, rows: dict[int, dict[str, Any]], device: str = GB10, **shape: Any) -> Path:
    default: dict[str, Any] = {
        "kernel": "moe_w13",
        "experts": 128,
        "top_k": 8,
        "size_n": 768,
        "size_k": 2048,
        "group_size": 128,
        "quant_type": "uint4b8",
    }
    common: dict[str, Any] = {"block_size_m": 8, "provenance": TUNED}
    entries = {tokens: MarlinRow(**(common | entry)) for tokens, entry in rows.items()}
    table = MarlinTable(device=device, shape=MarlinShape(**(default | shape)), rows=entries)
    return store_marlin_table(table, folder / "marlin")


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def errors(folder: Path, compile_kernels: bool = False) -> list[str]:
    report = check_tables([folder], compile_kernels)
    assert report.tables
    return [finding.sentence for finding in report.findings if finding.kind == "error"]


def the_error(folder: Path, compile_kernels: bool = False) -> str:
    """The only one."""
    found = errors(folder, compile_kernels)
    assert len(found) == 1, found
    return found[0]


@pytest.fixture(scope="module")
def shipped() -> CheckReport:
    return check_tables([shipped_folder()])


def test_kernels_are_compiled_here() -> None:
    """Else the tests below would pass without having looked."""
    assert unavailable() is None


def test_every_shipped_table_passes(shipped: CheckReport) -> None:
    assert not [finding for finding in shipped.findings if finding.kind == "error"]
    assert len(shipped.tables) == len(shipped.contents) >= 6
    assert shipped.compiler is not None
    assert shipped.unchecked == ()


def test_no_shipped_row_is_without_effect(shipped: CheckReport) -> None:
    """Each table has a row that vLLM would not choose, and no row that is called tuned is vLLM's choice."""
    assert not [finding for finding in shipped.findings if "no effect" in finding.sentence]
    assert all(content.tuned for content in shipped.contents)


def test_each_shipped_row_has_a_source_and_a_grade(shipped: CheckReport) -> None:
    for content in shipped.contents:
        for rows, source in content.tuned.items():
            assert source is not None
            named = (source.kind, source.device, source.grade)
            assert named == ("published", GB10, "A"), (content.table.name, rows)
            assert source.source
            assert source.date
            assert source.versions
            assert source.note
            assert source.gain is None or source.gain >= 0.02, (content.table.name, rows)


def test_shipped_tables_are_what_the_published_sets_give(tmp_path: Path) -> None:
    """Nobody edited them by hand. Rows of vLLM's choice are those of the version that wrote them."""
    written = write_tables(shipped_folder(), tmp_path)
    tables = [path for path in (shipped_folder() / "fused_moe").iterdir() if not path.match("*.provenance.json")]
    assert {path.name for path in written} == {path.name for path in tables}
    for path in written:
        there = shipped_folder() / path.relative_to(tmp_path)
        ours, theirs = (_tuned(each) for each in (there, path))
        assert ours == theirs != {}, path.name


def test_shipped_rows_of_vllms_choice_have_the_version_of_a_source() -> None:
    """Not that of a build, of which serving has another."""
    for path in (shipped_folder() / "fused_moe").glob("*.provenance.json"):
        rows = FusedMoeProvenance.model_validate_json(path.read_text()).rows.values()
        versions = {row.versions["vllm"] for row in rows if row.grade is None and "vllm" in row.versions}
        assert versions == {source_version(version) for version in versions}, path.name


def _tuned(path: Path) -> dict[int, tuple[dict[str, int], Provenance]]:
    rows, provenance = load_fused_moe_table(path).rows, load_fused_moe_provenance(path)
    assert provenance is not None
    return {key: (rows[key], each) for key, each in provenance.rows.items() if each.grade is not None}


def test_sound_tables_of_a_user_pass(tmp_path: Path) -> None:
    store_fused_moe(tmp_path, BLOCK, {1: SMALL, 2: SMALL, 4: SMALL, 8: SMALL})
    store_int4(tmp_path, {"BLOCK_SIZE_M": 16, "GROUP_SIZE_M": 1})
    tile = {"thread_k": 64, "thread_n": 128, "blocks_per_sm": 3}
    store_marlin(tmp_path, {1: tile, 2: tile, 4: tile, 8: {}})
    assert errors(tmp_path, compile_kernels=True) == []


@pytest.mark.parametrize(
    "shape", [BF16, BLOCK, FusedMoeShape(128, 384, "fp8_w8a8"), FusedMoeShape(128, 384, "int8_w8a8")]
)
def test_the_rule_for_shared_memory_is_what_the_compiler_says(shape: FusedMoeShape) -> None:
    for row in (SMALL, SMALL | {"BLOCK_SIZE_M": 64, "num_stages": 4}, SMALL | {"BLOCK_SIZE_N": 128, "num_warps": 8}):
        by_rule, compiled = shared_bytes(shape, row), compile_row(shape, row, (12, 1)).shared_bytes
        assert by_rule is not None
        assert by_rule <= compiled <= by_rule + (512 if shape is BLOCK else 0)


# What the rules of FusedMoE's tables find.


def test_more_than_99_kib(tmp_path: Path) -> None:
    """(5 - 1) * (64 + 64) * 128 * 2 bytes."""
    store_fused_moe(tmp_path, BF16, {1: SMALL | {"BLOCK_SIZE_M": 64, "num_stages": 5}})
    assert "131072 bytes of shared memory, and a block may have 101376" in the_error(tmp_path)


def test_more_than_99_kib_of_4_bit_weights(tmp_path: Path) -> None:
    """They are converted in one buffer, and inputs have all stages: 2 * 128 * (5 * 64 + 128) bytes."""
    row = SMALL | {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "num_stages": 6, "num_warps": 8}
    store_int4(tmp_path, row)
    assert "114688 bytes of shared memory, and a block may have 101376" in errors(tmp_path)[0]
    store_int4(tmp_path, row | {"num_stages": 5})
    assert errors(tmp_path) == [], "98304 bytes"


@pytest.mark.parametrize(
    ("group", "tile", "stages"), [(128, (64, 64, 64), 3), (128, (64, 64, 32), 3), (32, (32, 128, 32), 4)]
)
def test_the_rule_for_4_bit_weights_is_what_the_compiler_says(group: int, tile: tuple[int, ...], stages: int) -> None:
    sizes = dict(zip(("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K"), tile, strict=True))
    row = SMALL | sizes | {"num_stages": stages}
    assert shared_bytes(INT4, row) == compile_row(INT4, row, (12, 1), int4=Int4(group)).shared_bytes


def test_a_block_that_the_kernel_for_few_tokens_does_not_have(tmp_path: Path) -> None:
    """Of 128 experts, steps of up to 24 tokens run on it whatever the experts of a token."""
    rows = {2**power: SMALL for power in range(11)}
    for row, sound in ((16, False), (64, True)):
        table = FusedMoeTable(rows | {row: SMALL | {"BLOCK_SIZE_M": 128, "num_stages": 2}})
        provenance = FusedMoeProvenance(rows=dict.fromkeys(rows, TUNED))
        store_fused_moe_table(INT4, GB10, table, provenance, tmp_path / "fused_moe")
        assert [
            ("BLOCK_SIZE_M=128 is more than 64, the maximum of the CUDA kernel with which vLLM 0.26" in each)
            for each in errors(tmp_path)
        ] == ([] if sound else [True])


def test_a_table_without_effect(tmp_path: Path) -> None:
    store_fused_moe(tmp_path, BLOCK, {})
    store_marlin(tmp_path, {1: {"provenance": DEFAULT}})
    found = check_tables([tmp_path], False)
    none = "it has no effect, since each row is vLLM's choice, and can be removed"
    assert [(each.kind, each.sentence) for each in found.findings] == [("note", none)] * 2
    assert [content.tuned for content in found.contents] == [{}, {}]


def test_a_row_that_is_called_tuned_and_is_vllms_choice(tmp_path: Path) -> None:
    store_fused_moe(tmp_path, BLOCK, {1: default_row(BLOCK, 1), 2: SMALL | {"BLOCK_SIZE_N": 32}})
    (found,) = check_tables([tmp_path], False).findings
    assert (found.kind, found.row) == ("note", 1)
    assert "it is derived, and has no effect: it is vLLM's choice" in found.sentence
    (content,) = check_tables([tmp_path], False).contents
    assert set(content.tuned) == {2}


def test_spills(tmp_path: Path) -> None:
    row = SMALL | {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 128, "num_stages": 2}
    store_fused_moe(tmp_path, BLOCK, {1: row})
    assert errors(tmp_path) == []
    assert "spills" in the_error(tmp_path, compile_kernels=True)


def test_a_kernel_that_triton_refuses(tmp_path: Path) -> None:
    """A tile of more than 2**20 numbers; with one stage the rule for shared memory has nothing against it."""
    store_fused_moe(tmp_path, BLOCK, {1: SMALL | {"BLOCK_SIZE_N": 16384, "num_stages": 1}})
    assert errors(tmp_path) == []
    assert "Triton refuses" in the_error(tmp_path, compile_kernels=True)


def test_missing_rows_for_many_tokens(tmp_path: Path) -> None:
    """The trap of the nearest key: rows for 1 to 8 tokens would be taken for prefill."""
    table = FusedMoeTable({1: SMALL, 2: SMALL, 4: SMALL, 8: SMALL})
    provenance = FusedMoeProvenance(rows=dict.fromkeys(table.rows, TUNED))
    store_fused_moe_table(BLOCK, GB10, table, provenance, tmp_path / "fused_moe")
    assert "prefill of thousands of tokens uses it" in the_error(tmp_path)


def test_a_gap_between_rows(tmp_path: Path) -> None:
    """Steps of 500 tokens are nearer to 8 than to 1024."""
    table = FusedMoeTable({1: SMALL, 8: SMALL, 1024: SMALL})
    provenance = FusedMoeProvenance(rows=dict.fromkeys(table.rows, TUNED))
    store_fused_moe_table(BLOCK, GB10, table, provenance, tmp_path / "fused_moe")
    found = errors(tmp_path)
    assert len(found) == 2
    assert any("for steps of up to 516 tokens" in sentence for sentence in found)


def test_a_default_that_is_none_for_every_step(tmp_path: Path) -> None:
    """Without its row for 9 tokens, steps of 9 to 12 take the one for 8."""
    path = store_fused_moe(tmp_path, BLOCK, {})
    for file in (path, provenance_path(path)):
        edit(file, lambda content: content.get("rows", content).pop("9"))
    assert "that differs for steps of 9 tokens" in the_error(tmp_path)


@pytest.mark.parametrize("device", ["GB10", "NVIDIA_DGX_Spark", "NVIDIA_H200"])
def test_a_wrong_device(tmp_path: Path, device: str) -> None:
    store_fused_moe(tmp_path, BLOCK, {1: SMALL}, device=device)
    assert repr(device) in the_error(tmp_path)


MEASURED_ON_H200 = Provenance(
    kind="measured", device="NVIDIA_H200", date=date(2026, 11, 24), versions={"vllm": "0.33.0"}, gain=0.1
)


def test_a_device_on_which_it_was_measured(tmp_path: Path) -> None:
    """A user's own GPU: fine, and said that its limits are not known."""
    tile = {"thread_k": 64, "thread_n": 128, "blocks_per_sm": 2}
    store_marlin(tmp_path, {1: {**tile, "provenance": MEASURED_ON_H200}}, device="NVIDIA_H200")
    # Rows above those that were measured are vLLM's own rule.
    store_fused_moe(tmp_path, BLOCK, {1: SMALL}, device="NVIDIA_H200", tuned_is=MEASURED_ON_H200)
    report = check_tables([tmp_path])
    assert [finding.kind for finding in report.findings] == ["note", "note"]
    assert all("the limits of NVIDIA_H200" in finding.sentence for finding in report.findings)


def test_a_device_on_which_only_some_of_it_was_measured(tmp_path: Path) -> None:
    store_marlin(tmp_path, {1: {"provenance": MEASURED_ON_H200}, 2: {"provenance": TUNED}}, device="NVIDIA_H200")
    assert "its rows were not measured there" in the_error(tmp_path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"BLOCK_SIZE_M": 24}, "BLOCK_SIZE_M=24 is not a power of two"),
        ({"BLOCK_SIZE_M": 8}, "BLOCK_SIZE_M=8 is less than 16"),
        ({"BLOCK_SIZE_K": 16}, "BLOCK_SIZE_K=16 is less than 32"),
        ({"BLOCK_SIZE_K": 256}, "the kernel uses 128"),
        ({"num_warps": 3}, "num_warps=3"),
        ({"num_warps": 64}, "num_warps=64"),
        ({"num_stages": 0}, "num_stages=0"),
        ({"GROUP_SIZE_M": 0}, "GROUP_SIZE_M=0"),
        ({"SPLIT_K": 2}, "SPLIT_K=2"),
        ({"waves_per_eu": 2}, "no parameter waves_per_eu"),
    ],
)
def test_a_bad_row(tmp_path: Path, row: dict[str, int], words: str) -> None:
    store_fused_moe(tmp_path, BLOCK, {1: SMALL | row})
    assert words in the_error(tmp_path)


def test_a_row_that_lacks_something(tmp_path: Path) -> None:
    store_fused_moe(tmp_path, BLOCK, {1: {key: value for key, value in SMALL.items() if key != "num_stages"}})
    assert "lacks num_stages" in the_error(tmp_path)


@pytest.mark.parametrize(
    ("block_k", "group", "sound"),
    [(128, None, True), (256, None, True), (64, None, False), (512, None, False), (64, 32, True), (512, 64, True)],
)
def test_groups_of_4_bit_weights(tmp_path: Path, block_k: int, group: int | None, sound: bool) -> None:
    """A block must hold 1, 2, 4 or 8 of them, or vLLM's kernel for few tokens fails (seen with groups of 32)."""
    row = SMALL | {"BLOCK_SIZE_K": block_k, "BLOCK_SIZE_N": 32, "num_stages": 2}
    store_int4(tmp_path, row, group)
    found = errors(tmp_path)
    assert bool(found) != sound
    assert all("takes 1, 2, 4 or 8" in sentence for sentence in found)


def test_groups_of_4_bit_weights_in_steps_that_take_a_row_from_below(tmp_path: Path) -> None:
    """8 experts: vLLM takes its kernel for few tokens up to 48 of one expert each, and 25 to 48 take the row for 32."""
    shape = FusedMoeShape(8, 7168, "int4_w4a16")
    small = SMALL | {"BLOCK_SIZE_K": 128, "BLOCK_SIZE_N": 32, "num_stages": 2}
    rows = {2**power: dict(small) for power in range(11)}
    for row, sound in ((16, False), (32, False), (64, True)):
        table = FusedMoeTable(rows | {row: small | {"BLOCK_SIZE_K": 32}})
        provenance = FusedMoeProvenance(rows=dict.fromkeys(rows, TUNED), group_size=128)
        store_fused_moe_table(shape, GB10, table, provenance, tmp_path / "fused_moe")
        assert [("is 0 groups of 128" in each) for each in errors(tmp_path)] == ([] if sound else [True])


def test_half_of_a_4_bit_row(tmp_path: Path) -> None:
    store_int4(tmp_path, {"BLOCK_SIZE_M": 16, "GROUP_SIZE_M": 1, "BLOCK_SIZE_K": 128})
    assert set(errors(tmp_path)) == {"BLOCK_SIZE_N and BLOCK_SIZE_K go together: vLLM sets both if one is missing"}


def test_a_table_that_hides_vllms_own(tmp_path: Path) -> None:
    """vLLM has one for 512 experts of width 512 on a GB10; one that says nothing must not stand before it."""
    source = kernel_source()
    assert source is not None
    shape = FusedMoeShape(512, 512, "fp8_w8a8", (128, 128))
    if not (source.parent / "configs" / shape.file_name(GB10)).is_file():
        pytest.skip("vLLM before 0.32 has no table for a GB10")
    store_fused_moe(tmp_path, shape, {})
    assert "hides the table that comes with vLLM" in the_error(tmp_path)


def test_a_type_of_weights_that_vllm_does_not_ask_for(tmp_path: Path) -> None:
    path = store_fused_moe(tmp_path, BLOCK, {1: SMALL})
    for file in (path, provenance_path(path)):
        file.rename(file.with_name(file.name.replace("fp8_w8a8", "fp8_w8a16")))
    assert "dtype=fp8_w8a16" in the_error(tmp_path)


def test_rows_in_another_order(tmp_path: Path) -> None:
    """Of two rows equally near, vLLM takes the first in the file."""
    path = store_fused_moe(tmp_path, BLOCK, {1: SMALL})
    edit(path, lambda content: content.update({"1": content.pop("1")}))
    assert "not in ascending order" in the_error(tmp_path)


def test_a_name_that_vllm_does_not_ask_for(tmp_path: Path) -> None:
    path = store_fused_moe(tmp_path, BLOCK, {1: SMALL})
    for file in (path, provenance_path(path)):
        file.rename(file.with_name(file.name.replace(",block_shape", ", block_shape")))
    assert "is not the name of a FusedMoE table" in the_error(tmp_path)


# Provenance and duplicates, of both kinds of tables.


def test_no_provenance(tmp_path: Path) -> None:
    path = store_fused_moe(tmp_path, BLOCK, {1: SMALL})
    provenance_path(path).unlink()
    assert "it has no provenance" in the_error(tmp_path)


def test_no_provenance_of_a_row(tmp_path: Path) -> None:
    path = store_fused_moe(tmp_path, BLOCK, {1: SMALL})
    edit(provenance_path(path), lambda content: content["rows"].pop("1"))
    assert "this row has no provenance" in the_error(tmp_path)


def test_provenance_of_nothing(tmp_path: Path) -> None:
    path = store_fused_moe(tmp_path, BLOCK, {1: SMALL})
    edit(provenance_path(path), lambda content: content["rows"].update({"3": {"kind": "derived", "rule": "r"}}))
    assert "no such row" in the_error(tmp_path)
    path.unlink()
    assert "which does not exist" in check_tables([tmp_path]).findings[0].sentence


@pytest.mark.parametrize(
    ("provenance", "words"),
    [
        (None, "this row has no provenance"),
        ({"kind": "measured"}, "lacks device, date, versions, gain"),
        ({"kind": "published"}, "lacks source"),
        ({"kind": "derived"}, "lacks rule"),
        (
            {"kind": "measured", "device": "NVIDIA_H200", "date": "2026-11-24", "versions": {"vllm": "1"}, "gain": 0.1},
            "measured on NVIDIA_H200, not on NVIDIA_GB10",
        ),
        (
            {"kind": "measured", "device": GB10, "date": "2026-11-24", "versions": {"vllm": "1"}, "gain": -0.05},
            "5.0% slower",
        ),
    ],
)
def test_provenance_with_gaps(tmp_path: Path, provenance: object, words: str) -> None:
    store_marlin(tmp_path, {1: {"provenance": provenance}})
    assert words in the_error(tmp_path)


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    path = store_fused_moe(tmp_path, BLOCK, {1: SMALL})
    path.write_text(path.read_text().replace('"2": {', '"1": {', 1))
    assert "occurs twice" in the_error(tmp_path)


@pytest.mark.parametrize("kind", ["marlin", "fused_moe"])
def test_a_broken_file(tmp_path: Path, kind: str) -> None:
    path = store_marlin(tmp_path, {1: {}}) if kind == "marlin" else store_fused_moe(tmp_path, BLOCK, {1: SMALL})
    path.write_text("{")
    assert str(path) in the_error(tmp_path)


def test_two_tables_for_the_same(tmp_path: Path) -> None:
    path = store_marlin(tmp_path, {1: {}})
    (tmp_path / path.name).write_text(path.read_text())
    assert "remove one of them" in the_error(tmp_path)


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("fused_moe", False),
        ("tables", False),
        ("marlin", True),
        ("configs", True),
        ("tuned", True),
    ],
)
def test_a_fused_moe_table_where_serving_does_not_look(tmp_path: Path, where: str, found: bool) -> None:
    path = store_fused_moe(tmp_path, BLOCK, {1: SMALL})
    folder = tmp_path / where
    folder.mkdir(exist_ok=True)
    for file in (path, provenance_path(path)):
        file.rename(folder / file.name)
    given = tmp_path if where in ("fused_moe", "marlin") else folder
    assert errors(given) == (
        [f"serving does not read {folder} for such tables; move it to a folder named fused_moe"] if found else []
    )


def test_a_marlin_table_where_serving_does_not_look(tmp_path: Path) -> None:
    path = store_marlin(tmp_path, {1: {}})
    path.parent.rename(tmp_path / "fused_moe")
    assert "a folder named marlin" in the_error(tmp_path)


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    """As far as one can be had for root too: a name that is too long."""
    with pytest.raises(ConfigurationError, match="cannot be read"):
        check_tables([tmp_path / ("x" * 300)])


def test_groups_of_no_weights(tmp_path: Path) -> None:
    store_int4(tmp_path, SMALL | {"BLOCK_SIZE_N": 32, "num_stages": 2}, 128)
    (path,) = (tmp_path / "fused_moe").glob("*.provenance.json")
    edit(path, lambda content: content.update(group_size=0))
    assert "group_size: input should be greater than 0" in the_error(tmp_path)


@pytest.mark.parametrize("kind", ["marlin", "fused_moe"])
def test_json_that_is_nested_too_deeply(tmp_path: Path, kind: str) -> None:
    path = store_marlin(tmp_path, {1: {}}) if kind == "marlin" else store_fused_moe(tmp_path, BLOCK, {1: SMALL})
    path.write_text('{"a":' * 100_000)
    assert "nested too deeply" in the_error(tmp_path)


# What the rules of Marlin find.


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"thread_k": 32, "thread_n": 128, "blocks_per_sm": 1}, "less than 64"),
        ({"thread_k": 64, "thread_n": 256, "blocks_per_sm": 1}, "no kernel is compiled"),
        ({"thread_k": 128, "thread_n": 128, "blocks_per_sm": 2}, "a block may have"),
        ({"thread_k": 64, "thread_n": 128, "blocks_per_sm": 5}, "blocks_per_sm is 5"),
        ({"thread_k": 64}, "a whole tile or none"),
        ({"blocks_per_sm": 2}, "a whole tile or none"),
        ({"block_size_m": 16}, "vLLM uses 8 for 1 tokens"),
    ],
)
def test_a_bad_marlin_entry(tmp_path: Path, entry: dict[str, Any], words: str) -> None:
    store_marlin(tmp_path, {1: entry})
    assert words in the_error(tmp_path)


def test_a_tile_that_does_not_divide(tmp_path: Path) -> None:
    entry = {"thread_k": 128, "thread_n": 64, "blocks_per_sm": 1}
    store_marlin(tmp_path, {1: entry}, kernel="moe_w2", size_n=2048, size_k=704, group_size=64)
    assert "K=704 is not a multiple of thread_k=128" in the_error(tmp_path)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"thread_k": 128, "thread_n": 64, "blocks_per_sm": 1}, "K=704 is not a multiple of thread_k=128"),
        ({"thread_k": 64, "thread_n": 128, "blocks_per_sm": 5}, "blocks_per_sm is 5; Marlin's locks cover 1 to 4"),
        ({"thread_k": 64, "thread_n": 256, "blocks_per_sm": 1}, "no kernel is compiled"),
        ({"thread_k": 64, "thread_n": 128, "blocks_per_sm": 4}, None),
    ],
)
def test_an_entry_for_a_device_that_is_not_known(tmp_path: Path, entry: dict[str, Any], words: str | None) -> None:
    shape: dict[str, Any] = {"kernel": "moe_w2", "size_n": 2048, "size_k": 704, "group_size": 64}
    store_marlin(tmp_path, {1: entry | {"provenance": MEASURED_ON_H200}}, device="NVIDIA_H200", **shape)
    found = errors(tmp_path)
    assert len(found) == (words is not None)
    assert all(str(words) in sentence for sentence in found)


@pytest.mark.parametrize("kernel", ["moe_w13", "moe_w2"])
def test_rows_of_a_table_are_tokens_for_both_kernels(tmp_path: Path, kernel: str) -> None:
    path = store_marlin(tmp_path, {128: {}}, kernel=kernel)
    assert _gemm(load_marlin_table(path), 128).block_size_m == 16


def test_4_bit_kernels_are_compiled_for_the_tables_own_groups(tmp_path: Path) -> None:
    seen: list[Int4] = []

    def compiler(shape: FusedMoeShape, row: Any, capability: tuple[int, int], *, int4: Int4) -> Compiled:
        seen.append(int4)
        return Compiled(0, 0, 0)

    table = FusedMoeTable({1: SMALL, 1024: SMALL})
    for group_size in (64, None):
        provenance = FusedMoeProvenance(group_size=group_size, rows=dict.fromkeys(table.rows, TUNED))
        path = store_fused_moe_table(INT4, GB10, table, provenance, tmp_path)
        list(check_fused_moe_table(path, compiler, None))
    assert [each.group_size for each in seen] == [64, 64, 128, 128]


def test_a_shape_that_marlin_does_not_take(tmp_path: Path) -> None:
    store_marlin(tmp_path, {1: {}}, size_n=96)
    assert "N=96" in the_error(tmp_path)


def test_a_tile_for_the_dense_kernel(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"kernel": "dense", "experts": 1, "top_k": 1}
    store_marlin(tmp_path, {1: {"thread_k": 64, "thread_n": 128, "block_size_m": None}}, **shape)
    assert "takes no tile" in the_error(tmp_path)


def test_atomic_adds_that_the_dense_kernel_ignores(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"kernel": "dense", "experts": 1, "top_k": 1}
    store_marlin(tmp_path, {1: {"use_atomic_add": True, "block_size_m": None}}, size_n=4096, **shape)
    assert "no effect above 2048" in the_error(tmp_path)


def test_a_name_for_another_shape(tmp_path: Path) -> None:
    path = store_marlin(tmp_path, {1: {}})
    path.rename(path.with_name(path.name.replace("N=768", "N=1536")))
    assert "its content requires the name kernel=moe_w13,E=128,top_k=8,N=768" in the_error(tmp_path)


def test_a_marlin_row_that_is_called_vllms_and_is_not(tmp_path: Path) -> None:
    store_marlin(tmp_path, {1: {"thread_k": 128, "thread_n": 128, "blocks_per_sm": 1, "provenance": DEFAULT}})
    assert "its provenance says that vLLM chooses, but it sets thread_k=128, thread_n=128" in the_error(tmp_path)


def test_a_default_that_was_edited(tmp_path: Path) -> None:
    """The sentence has the key and both values."""
    path = store_fused_moe(tmp_path, BLOCK, {})
    edit(path, lambda content: content["1024"].update(num_stages=2))
    assert re.search(r"that differs .*: num_stages=\d, not 2; correct it", the_error(tmp_path))


def test_a_name_that_serving_does_not_look_for(tmp_path: Path) -> None:
    path = store_marlin(tmp_path, {1: {}})
    path.rename(path.with_name("mine.json"))
    assert "its name is not the name of a table" in the_error(tmp_path)


def test_a_table_loose_in_a_folder_is_fine_and_must_be_moved(tmp_path: Path) -> None:
    path = store_marlin(tmp_path, {1: {"thread_k": 64, "thread_n": 128, "blocks_per_sm": 2}})
    path.rename(tmp_path / path.name)
    (found,) = check_tables([tmp_path]).findings
    assert (found.kind, "only from a folder named marlin" in found.sentence) == ("note", True)


def test_a_name_for_another_device(tmp_path: Path) -> None:
    path = store_marlin(tmp_path, {1: {}})
    path.rename(path.with_name(path.name.replace(GB10, "NVIDIA_GB20")))
    assert f"device_name={GB10}" in the_error(tmp_path)


def test_steps_that_take_a_row_for_another_block_size(tmp_path: Path) -> None:
    """8 experts of 8: vLLM changes from 8 to 16 rows in a block at 8 tokens."""
    entries = {1: {}, 2: {}, 4: {}, 12: {"block_size_m": 16}}
    store_marlin(tmp_path, entries, experts=8)
    assert "steps of 8 tokens take a row for block_size_m=8" in the_error(tmp_path)


def test_a_gap_between_marlin_rows(tmp_path: Path) -> None:
    store_marlin(tmp_path, {1: {}, 64: {}})
    assert "for steps of up to 32 tokens" in the_error(tmp_path)


# The command.


def test_the_command_passes_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store_marlin(tmp_path, {1: {}})
    assert main(["tune", "--check", str(tmp_path)]) == 0
    assert "1 table in" in capsys.readouterr().out
    store_marlin(tmp_path, {1: {"thread_k": 1, "thread_n": 1}})
    assert main(["tune", "--check", str(tmp_path)]) == 1
    assert "1 error" in capsys.readouterr().out


def test_the_command_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store_marlin(tmp_path, {1: {"thread_k": 1, "thread_n": 1}})
    assert main(["tune", "--check", str(tmp_path), "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["failed"] is True
    assert content["tables"] == [str(path)]
    assert content["findings"][0]["tokens"] == 1


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--check", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert main(["tune", "--check", str(tmp_path)]) == 2
    assert "There is no table" in capsys.readouterr().out


def test_without_triton_it_says_what_it_did_not_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store_fused_moe(tmp_path, BLOCK, {1: SMALL})
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["tune", "--check", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "NOT CHECKED" in shown
    assert "Triton is not installed" in shown
