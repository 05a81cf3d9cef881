"""Tables that a search makes: what goes into them, what stays of earlier ones, and what serving finds."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spark.kernels import lookup
from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.fused_moe import table as fused_moe_table
from vllm_spark.kernels.fused_moe.check import check_fused_moe_table
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, pinned_rows, vllm_has_table, vllm_row
from vllm_spark.kernels.fused_moe.table import FusedMoeTable, load_fused_moe_provenance
from vllm_spark.kernels.marlin.check import check_marlin_table
from vllm_spark.kernels.table import VLLM_DEFAULT
from vllm_spark.tune.decode_comparison import promoted
from vllm_spark.tune.fused_moe.search import search_space
from vllm_spark.tune.journal import Journal, Kept
from vllm_spark.tune.results import (
    MARLIN_DEFAULT,
    MarlinOutcome,
    Outcome,
    Shape,
    tunable_rows,
)
from vllm_spark.tune.tables import NewFusedMoeTable, new_tables, store_tables

from .tuning_outcomes import (
    BF16,
    FP8_BLOCK,
    FP8_CHANNEL,
    INT4,
    ROW,
    VERSIONS,
    W13,
    experts,
    fused,
    marlin,
)


@pytest.mark.parametrize(("experts", "top_k", "last"), [(128, 8, 8), (4, 4, 7), (8, 7, 8)])
def test_marlin_is_tuned_for_the_blocks_that_vllm_makes(experts: int, top_k: int, last: int, tmp_path: Path) -> None:
    shape = W13.model_copy(update={"experts": experts, "top_k": top_k})
    rows = tunable_rows(shape, range(1, 9))
    assert rows == list(range(1, last + 1))
    (path,) = store_tables(new_tables([marlin(number, shape=shape) for number in rows], {}, GB10, VERSIONS), tmp_path)
    assert list(check_marlin_table(path)) == []
    triton = BF16.model_copy(update={"experts": experts, "top_k": top_k})
    assert tunable_rows(triton, range(1, 9)) == list(range(1, 9))


# Promotion


def test_rows_whose_decode_step_did_not_become_faster_go_back_to_the_default() -> None:
    outcomes: list[Outcome] = [marlin(1), marlin(8), fused(1), fused(5), fused(7)]
    kept = promoted(outcomes, {1: 0.99, 4: 0.996, 8: 1.01})
    assert kept[0] == outcomes[0]
    assert kept[2] == outcomes[2]
    for outcome in (kept[1], kept[3], kept[4]):
        assert outcome.parameters == (MARLIN_DEFAULT if isinstance(outcome, MarlinOutcome) else None)
        assert (outcome.ratio, outcome.tuned_us) == (1.0, outcome.default_us)
    assert [outcome.tried for outcome in kept] == [outcome.tried for outcome in outcomes], "for the plot"


# Tables


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where look-ups find this user's tables, while there are no others; what was read is forgotten afterwards."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(lookup, "configs_folder", lambda: tmp_path / "configs")
    lookup.clear_cache()
    folder = lookup.user_folder()
    assert folder is not None
    yield folder
    lookup.clear_cache()


def test_tables_are_found_where_serving_looks(user_folder: Path) -> None:
    outcomes: list[Outcome] = [marlin(1), marlin(8, 1.0, MARLIN_DEFAULT), fused(1), fused(8, 1.0, None)]
    models: dict[Shape, list[str]] = {W13: ["a TP=2"], BF16: ["b TP=2", "c TP=1"]}
    paths = store_tables(new_tables(outcomes, models, GB10, VERSIONS), user_folder)
    assert [path.parent.name for path in paths] == ["marlin", "fused_moe"]
    found = lookup.find_marlin_table(GB10.name, W13)
    assert found is not None
    table = found[1]
    assert table.models == ("a TP=2",)
    assert (table.rows[1].thread_n, table.rows[8].uses_default_tile) == (128, True)
    assert table.row(9) is None
    moe = lookup.find_fused_moe_table(GB10.name, 128, 384, None, None)
    assert moe is not None
    assert moe[0] == paths[1]
    assert moe[1][1] == ROW.row()
    assert moe[1][8] == vllm_row(BF16, GB10.name, 8)


def test_every_row_says_where_it_came_from(user_folder: Path) -> None:
    (path,) = store_tables(new_tables([fused(1), fused(8, 1.0, None)], {BF16: ["b TP=2"]}, GB10, VERSIONS), user_folder)
    provenance = load_fused_moe_provenance(path)
    assert provenance is not None
    assert provenance.models == ("b TP=2",)
    measured = provenance.rows[1]
    assert (measured.kind, measured.device, measured.versions, measured.gain) == ("measured", GB10.name, VERSIONS, 0.1)
    assert measured.date == datetime.date.today()
    assert provenance.rows[8].gain == 0.0
    assert {row.rule for tokens, row in provenance.rows.items() if tokens > 8} == {VLLM_DEFAULT}
    assert not any(row.missing_fields() for row in provenance.rows.values())


@pytest.mark.parametrize("shape", [BF16, FP8_BLOCK, FP8_CHANNEL, INT4])
@pytest.mark.parametrize("rows", [(1, 2, 3, 4, 5, 6, 7, 8), (1, 4, 8), (2,)])
def test_tables_pass_the_check(tmp_path: Path, shape: FusedMoeExperts, rows: tuple[int, ...]) -> None:
    best = search_space(shape, 1, GB10)[0]
    outcomes = [
        fused(each, 0.9 if each % 2 else 1.0, shape=shape, parameters=best if each % 2 else None) for each in rows
    ]
    (path,) = store_tables(new_tables(outcomes, {}, GB10, VERSIONS), tmp_path)
    findings = [finding.sentence for finding in check_fused_moe_table(path, None, None)]
    none = "it has no effect, since each row is vLLM's choice, and can be removed"
    assert findings == ([none] if rows == (2,) else [])


@given(shape=experts(), above=st.integers(1, 8), tokens=st.integers(9, 30_000))
@settings(deadline=None, max_examples=30)
def test_larger_steps_get_what_vllm_gives_them(shape: FusedMoeExperts, above: int, tokens: int) -> None:
    rows = {above: {"BLOCK_SIZE_M": -1}, **pinned_rows(shape, GB10.name, above)}
    assert FusedMoeTable(rows).row(tokens) == vllm_row(shape, GB10.name, tokens)
    assert FusedMoeTable(rows).row(above + 1) == vllm_row(shape, GB10.name, above + 1)


def test_a_table_of_vllm_itself_is_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = FP8_BLOCK.model_copy(update={"experts": 256, "intermediate": 512})
    theirs = {"1": 17, "8": 18, "24": 19, "1024": 20, "4096": 21}
    path = tmp_path / "configs" / shape.table.file_name(GB10.name)
    path.parent.mkdir()
    path.write_text(json.dumps({key: {"BLOCK_SIZE_M": value} for key, value in theirs.items()}))
    monkeypatch.setattr("vllm_spark.kernels.fused_moe.shapes.kernel_source", lambda: tmp_path / "fused_moe.py")
    assert vllm_has_table(shape, GB10.name)
    assert not vllm_has_table(shape, "NVIDIA_H200")
    wanted = {int(key): {"BLOCK_SIZE_M": value} for key, value in theirs.items()}
    pinned = pinned_rows(shape, GB10.name, 8)
    for tokens in range(9, 6000):
        nearest = wanted[min(wanted, key=lambda known: abs(known - tokens))]
        assert FusedMoeTable({8: {}, **pinned}).row(tokens) == nearest, tokens
    (table,) = new_tables([fused(shape=shape)], {}, GB10, VERSIONS)
    assert isinstance(table, NewFusedMoeTable)
    assert {row.kind for row in table.provenance.rows.values()} == {"measured", "published"}


def test_experts_of_one_table_that_disagree_get_the_default() -> None:
    other = BF16.model_copy(update={"hidden": 4096})
    wide = ROW.model_copy(update={"BLOCK_SIZE_N": 64})
    outcomes = [fused(1), fused(2), fused(1, shape=other), fused(2, shape=other, parameters=wide)]
    (table,) = new_tables(outcomes, {BF16: ["a"], other: ["b"]}, GB10, VERSIONS)
    assert isinstance(table, NewFusedMoeTable)
    assert table.table.rows[1] == ROW.row()
    assert table.table.rows[2] == vllm_row(BF16, GB10.name, 2)
    assert table.provenance.rows[2].gain == 0.0
    assert table.provenance.models == ("a", "b")


def test_experts_of_earlier_runs_that_disagree_get_the_default(tmp_path: Path) -> None:
    other = BF16.model_copy(update={"hidden": 4096})
    wide = ROW.model_copy(update={"BLOCK_SIZE_N": 64})
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    journal.add_kept([Kept(fused(1, shape=other), ("b",)), Kept(fused(2, shape=other, parameters=wide), ("b",))])
    journal.add_kept([Kept(fused(1, shape=INT4, parameters=wide), ("c",))])
    (table,) = new_tables([fused(1), fused(2)], {BF16: ["a"]}, GB10, VERSIONS, journal.kept().values(), tmp_path)
    assert isinstance(table, NewFusedMoeTable)
    assert table.table.rows[1] == ROW.row()
    assert table.table.rows[2] == vllm_row(BF16, GB10.name, 2)
    assert table.provenance.models == ("a", "b")


def test_a_tile_for_groups_of_one_size_is_not_given_to_another() -> None:
    small = INT4.model_copy(update={"group_size": 32})
    outcomes = [fused(1, shape=INT4), fused(2, shape=INT4), fused(1, shape=small)]
    (table,) = new_tables(outcomes, {}, GB10, VERSIONS)
    assert isinstance(table, NewFusedMoeTable)
    assert table.table.rows[1] == ROW.row()
    assert table.table.rows[2] == vllm_row(INT4, GB10.name, 2)
    assert table.provenance.group_size is None


def test_rows_that_are_not_measured_anew_stay(tmp_path: Path) -> None:
    """By the journal, with what a decode step said of them, and by tables that came without their journal."""
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    long_ago = datetime.date(2026, 1, 2)
    old: list[Outcome] = [marlin(1), marlin(8).model_copy(update={"date": long_ago}), fused(1), fused(8)]
    old[3] = old[3].with_default()
    store_tables(new_tables(old, {W13: ["a"], BF16: ["a"]}, GB10, VERSIONS), tmp_path)
    fast = ROW.model_copy(update={"num_warps": 8})
    new: list[Outcome] = [marlin(1, 0.7), fused(1, 0.7, fast)]
    for kept in ((), [Kept(outcome, ("a",)) for outcome in old]):
        journal.add_kept(kept)
        found = new_tables(new, {W13: ["b"], BF16: ["b"]}, GB10, VERSIONS, journal.kept().values(), tmp_path)
        table, moe = found
        assert isinstance(moe, NewFusedMoeTable)
        assert not isinstance(table, NewFusedMoeTable)
        gains = {rows: row.provenance and row.provenance.gain for rows, row in table.rows.items()}
        assert gains == {1: 0.3, **dict.fromkeys(range(2, 8)), 8: 0.1}
        assert table.rows[8].provenance is not None
        assert table.rows[8].provenance.date == long_ago
        assert (moe.table.rows[1], moe.table.rows[8]) == (fast.row(), vllm_row(BF16, GB10.name, 8))
        assert [row for row, source in moe.provenance.rows.items() if source.kind == "measured"] == [1, 8]
        assert set(table.models) == set(moe.provenance.models) == {"a", "b"}


def test_rows_of_other_versions_or_devices_do_not_stay(tmp_path: Path) -> None:
    old: list[Outcome] = [marlin(1), marlin(8), fused(1), fused(8)]
    store_tables(new_tables(old, {W13: ["a"]}, GB10, {**VERSIONS, "driver": "580"}), tmp_path)
    table, moe = new_tables([marlin(1), fused(1)], {}, GB10, VERSIONS, (), tmp_path)
    assert isinstance(moe, NewFusedMoeTable)
    assert not isinstance(table, NewFusedMoeTable)
    assert set(table.rows) == {1}
    assert table.models == ()
    assert [row for row, source in moe.provenance.rows.items() if source.kind == "measured"] == [1]


def test_steps_between_measured_rows_are_vllms(tmp_path: Path) -> None:
    """Also where another run measured the other row: no step takes the row of a step that is only near."""
    store_tables(new_tables([marlin(1), fused(1)], {}, GB10, VERSIONS), tmp_path)
    new = new_tables([marlin(8), fused(8)], {}, GB10, VERSIONS, (), tmp_path)
    table, moe = new
    assert isinstance(moe, NewFusedMoeTable)
    assert not isinstance(table, NewFusedMoeTable)
    for tokens in range(1, 9):
        tuned, row = tokens in (1, 8), table.row(tokens)
        assert row is not None
        assert row.uses_default_tile == (not tuned)
        assert moe.table.row(tokens) == (ROW.row() if tuned else vllm_row(BF16, GB10.name, tokens))
    paths = store_tables(new, tmp_path)
    assert [*check_marlin_table(paths[0]), *check_fused_moe_table(paths[1], None, None)] == []


def test_a_table_that_cannot_be_read_is_replaced_and_kept(tmp_path: Path) -> None:
    paths = store_tables(new_tables([marlin(8), fused(8)], {}, GB10, VERSIONS), tmp_path)
    for path in paths:
        path.write_text("{")
    notes: list[str] = []
    assert (
        store_tables(new_tables([marlin(1), fused(1)], {}, GB10, VERSIONS, (), tmp_path), tmp_path, notes.append)
        == paths
    )
    assert [path.with_name(path.name + ".bak").read_text() for path in paths] == ["{", "{"]
    assert len(notes) == 2


@pytest.mark.parametrize("kind", ["marlin", "fused_moe"])
def test_rows_of_somebody_elses_are_set_aside(tmp_path: Path, kind: str) -> None:
    outcome: Outcome = marlin(1) if kind == "marlin" else fused(1)
    new = new_tables([outcome], {}, GB10, VERSIONS)
    (path,) = store_tables(new, tmp_path)
    noted = path if kind == "marlin" else fused_moe_table.provenance_path(path)
    notes: list[str] = []
    store_tables(new, tmp_path, notes.append)
    assert notes == [], "all rows are a tuner's"
    theirs = noted.read_text().replace('"kind": "measured"', '"kind": "published", "source": "a forum"')
    for suffix in (".bak", ".bak1"):
        noted.write_text(theirs)
        before = path.read_text()
        store_tables(new, tmp_path, notes.append)
        assert path.with_name(path.name + suffix).read_text() == before
        assert noted.with_name(noted.name + suffix).read_text() == theirs
        assert f"{path}{suffix}" in notes.pop()
        assert notes == []
    assert not list(tmp_path.rglob("*bak*.json")), "no table that is looked for"


def test_steps_below_the_smallest_row_are_vllms() -> None:
    (table,) = new_tables([fused(4)], {}, GB10, VERSIONS)
    assert isinstance(table, NewFusedMoeTable)
    for tokens in (1, 2, 3, 5):
        assert table.table.row(tokens) == vllm_row(BF16, GB10.name, tokens)
    assert table.table.row(4) == ROW.row()


def test_int4_leaves_open_what_vllm_completes() -> None:
    assert vllm_row(INT4, GB10.name, 1) == {"BLOCK_SIZE_M": 1, "GROUP_SIZE_M": 1, "SPLIT_K": 1}
    (table,) = new_tables([fused(shape=INT4)], {}, GB10, VERSIONS)
    assert isinstance(table, NewFusedMoeTable)
    assert table.provenance.group_size == 128
    assert table.table.rows[1]["SPLIT_K"] == 1, "the kernel for int4 has no default for it"


@pytest.mark.parametrize("shape", [BF16, FP8_BLOCK, FP8_CHANNEL, INT4, INT4.model_copy(update={"experts": 8})])
def test_vllms_rule_is_the_one_known_here(shape: FusedMoeExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("vllm.model_executor.layers.fused_moe.fused_moe")

    class Cuda:
        """The rule asks which vendor's GPU there is; here is none."""

        is_rocm = staticmethod(lambda: False)
        is_cuda = staticmethod(lambda: True)

    monkeypatch.setattr(kernels, "current_platform", Cuda)
    block = [0, shape.group_size] if shape.is_int4 else list(shape.block_shape or ()) or None
    for tokens in (*range(1, 140), 511, 512, 513, 1024, 4096, 16_511, 16_512):
        theirs = kernels.get_default_config(
            tokens, shape.experts, shape.intermediate, shape.hidden, shape.top_k, shape.dtype, block
        )
        assert vllm_row(shape, "NO_DEVICE", tokens) == theirs, tokens


def test_fused_moe_tables_are_beside_their_provenance(tmp_path: Path) -> None:
    (path,) = store_tables(new_tables([fused()], {}, GB10, VERSIONS), tmp_path)
    assert path.name == "E=128,N=384,device_name=NVIDIA_GB10.json"
    assert fused_moe_table.provenance_path(path).is_file()
    assert json.loads(path.read_text())["triton_version"] == "3.8.0"
