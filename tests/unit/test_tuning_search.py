"""The search for kernels' parameters, as far as it goes without a GPU: what is tried, kept, written, and then found."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_spark.bench import decode
from vllm_spark.bench.decode_engine import Result
from vllm_spark.cli import tune as tune_command
from vllm_spark.cli import tune_model
from vllm_spark.errors import ConfigurationError, SparkError
from vllm_spark.files import configs_folder
from vllm_spark.kernels import lookup
from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.fused_moe import compile
from vllm_spark.kernels.fused_moe import table as fused_moe_table
from vllm_spark.kernels.fused_moe.check import check_fused_moe_table, shared_bytes
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, FusedMoeParameters, has_own_table, own_row, pinned_rows
from vllm_spark.kernels.fused_moe.table import FusedMoeShape, FusedMoeTable, load_fused_moe_provenance
from vllm_spark.kernels.marlin.check import check_marlin_table
from vllm_spark.kernels.marlin.table import MarlinParameters, MarlinShape, load_marlin_table
from vllm_spark.kernels.table import VLLM_DEFAULT
from vllm_spark.models.layers import Experts
from vllm_spark.models.shard import shard_as_model
from vllm_spark.models.weights import Int4
from vllm_spark.processes.group import process_group
from vllm_spark.tune import search, timing
from vllm_spark.tune.fused_moe.search import not_hopeless, search_space
from vllm_spark.tune.fused_moe.trial import Trials
from vllm_spark.tune.journal import FILE, Journal, Kept, installed_versions
from vllm_spark.tune.keeping import promoted
from vllm_spark.tune.marlin import search as marlin_search
from vllm_spark.tune.plan import backend, check_version_takes_int4, not_read_by_default, who_reads
from vllm_spark.tune.report import outcomes_tables, plot
from vllm_spark.tune.results import (
    MARLIN_DEFAULT,
    FusedMoeOutcome,
    MarlinOutcome,
    Outcome,
    tunable_rows,
)
from vllm_spark.tune.timing import HangError, Times, route
from vllm_spark.tune.tuned_model import TunedModel, fused_moe_shapes, layers_as_served, marlin_shapes, shapes_of
from vllm_spark.tune.tuner import NewFusedMoeTable, store, tables
from vllm_spark.tune.tuner import tune as run_tuner

from .folder_rights import no_entry

VERSIONS = {"vllm": "0.32.0", "torch": "2.13.0", "triton": "3.8.0"}
W13 = MarlinShape(kernel="moe_w13", experts=128, top_k=8, size_n=768, size_k=2048, group_size=128, quant_type="uint4b8")
TILE = MarlinParameters(thread_k=64, thread_n=128, blocks_per_sm=2, block_size_m=8)
BF16 = FusedMoeExperts(experts=128, top_k=8, hidden=2048, intermediate=384)
FP8_BLOCK = BF16.model_copy(update={"dtype": "fp8_w8a8", "block_shape": (128, 128)})
FP8_CHANNEL = BF16.model_copy(update={"dtype": "fp8_w8a8"})
INT4 = BF16.model_copy(update={"dtype": "int4_w4a16", "group_size": 128})
ROW = FusedMoeParameters(BLOCK_SIZE_M=16, BLOCK_SIZE_N=32, BLOCK_SIZE_K=128, num_warps=4, num_stages=4)


def marlin(
    rows: int = 1, ratio: float = 0.9, parameters: MarlinParameters = TILE, shape: MarlinShape = W13
) -> MarlinOutcome:
    return MarlinOutcome(
        shape=shape,
        rows=rows,
        parameters=parameters,
        default_us=10.0,
        tuned_us=10 * ratio,
        ratio=ratio,
        tried=[(TILE, ratio)],
    )


def fused(
    rows: int = 1,
    ratio: float = 0.9,
    parameters: FusedMoeParameters | None = ROW,
    shape: FusedMoeExperts = BF16,
    tried: Sequence[tuple[FusedMoeParameters, float]] = ((ROW, 0.9),),
) -> FusedMoeOutcome:
    return FusedMoeOutcome(
        shape=shape,
        rows=rows,
        parameters=parameters,
        default_us=20.0,
        tuned_us=20 * ratio,
        ratio=ratio,
        tried=list(tried),
    )


# The journal


def test_a_journal_gives_back_what_was_measured_of_either_kind(tmp_path: Path) -> None:
    written: list[Outcome] = [marlin(), marlin(8), fused(), fused(4, parameters=None), fused(shape=INT4)]
    journal = Journal(tmp_path / "new" / "folder", GB10.name, VERSIONS)
    assert journal.known() == {}
    for outcome in written:
        journal.add(outcome)
    again = Journal(tmp_path / "new" / "folder", GB10.name, VERSIONS)
    assert again.known() == {(outcome.shape, outcome.rows): outcome for outcome in written}


def test_the_newest_of_two_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    journal.add(fused(ratio=0.9))
    journal.add(fused(ratio=0.7))
    assert journal.known()[BF16, 1].ratio == 0.7


def test_experts_that_share_a_table_are_not_taken_for_each_other(tmp_path: Path) -> None:
    other = BF16.model_copy(update={"hidden": 4096})
    assert other.table == BF16.table
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    journal.add(fused())
    assert (other, 1) not in journal.known()


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_line_that_was_cut_off_costs_one_outcome(tmp_path: Path, cut: int) -> None:
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    journal.add(marlin())
    journal.add(fused())
    path = tmp_path / FILE
    path.write_text(path.read_text()[:-cut])
    expected = {(W13, 1)} if cut > 1 else {(W13, 1), (BF16, 1)}  # the last character is the end of the line
    assert set(journal.known()) == expected


def test_what_follows_a_line_that_was_cut_off_is_not_lost(tmp_path: Path) -> None:
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    journal.add(marlin())
    path = tmp_path / FILE
    path.write_text(path.read_text()[:-40])
    Journal(tmp_path, GB10.name, VERSIONS).add(fused())
    assert set(journal.known()) == {(BF16, 1)}


@pytest.mark.parametrize(
    ("device", "versions"), [("NVIDIA_H200", VERSIONS), (GB10.name, {**VERSIONS, "triton": "3.9.0"}), (GB10.name, {})]
)
def test_another_device_or_version_measures_anew(tmp_path: Path, device: str, versions: dict[str, str]) -> None:
    Journal(tmp_path, GB10.name, VERSIONS).add(marlin())
    other = Journal(tmp_path, device, versions)
    assert other.known() == {}
    other.add(marlin(ratio=0.5))
    assert Journal(tmp_path, GB10.name, VERSIONS).known()[W13, 1].ratio == 0.9


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"file/tuned cannot be written.*--out"):
        Journal(tmp_path / "file" / "tuned", GB10.name, VERSIONS)


def test_a_journal_that_is_no_text_costs_only_its_own_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    journal.add(marlin())
    with (tmp_path / FILE).open("ab") as file:
        file.write(b"\xff\xfe\x80 {\n")
    journal.add(fused())
    assert set(journal.known()) == {(W13, 1), (BF16, 1)}


def test_a_journal_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    (tmp_path / FILE).unlink()
    with pytest.raises(ConfigurationError, match=r"journal\.jsonl cannot be read \(No such file"):
        journal.known()


def test_a_full_disk_costs_a_sentence(tmp_path: Path) -> None:
    (tmp_path / FILE).symlink_to("/dev/full")
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    with pytest.raises(SparkError, match=r"journal\.jsonl cannot be written \(No space left.*make room"):
        journal.add(marlin())


def test_what_was_kept_is_apart_from_what_was_searched(tmp_path: Path) -> None:
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    journal.add(marlin())
    assert journal.kept() == {}
    journal.keep([Kept(marlin().with_default(), ("a",))])
    journal.keep([Kept(marlin().with_default(), ("b",))])
    assert journal.known() == {(W13, 1): marlin()}, "the search is not made again"
    assert journal.kept() == {(W13, 1): Kept(marlin().with_default(), ("a", "b"))}


def test_two_tuners_are_kept_apart(tmp_path: Path) -> None:
    first, second = (Journal(tmp_path, GB10.name, VERSIONS) for _ in range(2))
    with first.alone():
        with pytest.raises(SparkError, match="another vllm-spark tune is at work in"), second.alone():
            pass
        second.add(marlin())
    with second.alone():
        assert set(second.known()) == {(W13, 1)}


def test_a_hang_is_noted_beside_the_outcomes(tmp_path: Path) -> None:
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    journal.add(marlin())
    journal.add_hang(W13, TILE)
    journal.add_hang(BF16, ROW)
    assert (journal.hung(), set(journal.known()), journal.kept()) == ({TILE, ROW}, {(W13, 1)}, {})
    assert Journal(tmp_path, GB10.name, {**VERSIONS, "vllm": "0.33.0"}).hung() == set()


def test_versions_are_asked_of_the_packages_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm, triton = pytest.importorskip("vllm"), pytest.importorskip("triton")

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    versions = installed_versions()
    assert versions["triton"] == triton.__version__ == compile.triton_version()
    assert versions["vllm"] == vllm.__version__
    assert versions["vllm_spark"]


@pytest.mark.parametrize(("experts", "top_k", "last"), [(128, 8, 8), (4, 4, 7), (8, 7, 8)])
def test_marlin_is_tuned_for_the_blocks_that_vllm_makes(experts: int, top_k: int, last: int, tmp_path: Path) -> None:
    shape = W13.model_copy(update={"experts": experts, "top_k": top_k})
    rows = tunable_rows(shape, range(1, 9))
    assert rows == list(range(1, last + 1))
    (path,) = store(tables([marlin(number, shape=shape) for number in rows], {}, GB10, VERSIONS), tmp_path)
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
    lookup.forget()
    folder = lookup.user_folder()
    assert folder is not None
    yield folder
    lookup.forget()


def test_tables_are_found_where_serving_looks(user_folder: Path) -> None:
    outcomes = [marlin(1), marlin(8, 1.0, MARLIN_DEFAULT), fused(1), fused(8, 1.0, None)]
    models = {W13: ["a TP=2"], BF16: ["b TP=2", "c TP=1"]}
    paths = store(tables(outcomes, models, GB10, VERSIONS), user_folder)
    assert [path.parent.name for path in paths] == ["marlin", "fused_moe"]
    found = lookup.find_marlin_table(GB10.name, W13)
    assert found is not None
    table = found[1]
    assert table.models == ("a TP=2",)
    assert (table.rows[1].thread_n, table.rows[8].leaves_tile) == (128, True)
    assert table.row(9) is None
    moe = lookup.find_fused_moe_table(GB10.name, 128, 384, None, None)
    assert moe is not None
    assert moe[0] == paths[1]
    assert moe[1][1] == ROW.row()
    assert moe[1][8] == own_row(BF16, GB10.name, 8)


def test_every_row_says_where_it_came_from(user_folder: Path) -> None:
    (path,) = store(tables([fused(1), fused(8, 1.0, None)], {BF16: ["b TP=2"]}, GB10, VERSIONS), user_folder)
    provenance = load_fused_moe_provenance(path)
    assert provenance is not None
    assert provenance.models == ("b TP=2",)
    measured = provenance.rows[1]
    assert (measured.kind, measured.device, measured.versions, measured.gain) == ("measured", GB10.name, VERSIONS, 0.1)
    assert measured.date == datetime.date.today()
    assert provenance.rows[8].gain == 0.0
    assert {row.rule for tokens, row in provenance.rows.items() if tokens > 8} == {VLLM_DEFAULT}
    assert not any(row.missing() for row in provenance.rows.values())


@pytest.mark.parametrize("shape", [BF16, FP8_BLOCK, FP8_CHANNEL, INT4])
@pytest.mark.parametrize("rows", [(1, 2, 3, 4, 5, 6, 7, 8), (1, 4, 8), (2,)])
def test_tables_pass_the_check(tmp_path: Path, shape: FusedMoeExperts, rows: tuple[int, ...]) -> None:
    best = search_space(shape, 1, GB10)[0]
    outcomes = [fused(each, shape=shape, parameters=best if each % 2 else None) for each in rows]
    (path,) = store(tables(outcomes, {}, GB10, VERSIONS), tmp_path)
    findings = list(check_fused_moe_table(path, None, None))
    assert findings == []


FORMATS = st.sampled_from([BF16, FP8_BLOCK, FP8_CHANNEL, INT4, INT4.model_copy(update={"group_size": 32})])
SIZES = {
    "experts": st.sampled_from([8, 60, 128, 256, 512]),
    "top_k": st.integers(1, 8),
    "hidden": st.sampled_from([2048, 3072, 4096]),
    "intermediate": st.sampled_from([128, 256, 384, 704, 768, 1024, 1536]),
}


@st.composite
def experts(draw: st.DrawFn) -> FusedMoeExperts:
    shape = draw(FORMATS).model_copy(update={name: draw(values) for name, values in SIZES.items()})
    if shape.intermediate == 704 and (shape.group_size or shape.block_shape):
        shape = shape.model_copy(update={"intermediate": 640})  # whole groups and blocks
    return shape


@given(shape=experts(), above=st.integers(1, 8), tokens=st.integers(9, 30_000))
@settings(deadline=None, max_examples=30)
def test_larger_steps_get_what_vllm_gives_them(shape: FusedMoeExperts, above: int, tokens: int) -> None:
    rows = {above: {"BLOCK_SIZE_M": -1}, **pinned_rows(shape, GB10.name, above)}
    assert FusedMoeTable(rows).row(tokens) == own_row(shape, GB10.name, tokens)
    assert FusedMoeTable(rows).row(above + 1) == own_row(shape, GB10.name, above + 1)


def test_a_table_of_vllm_itself_is_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = FP8_BLOCK.model_copy(update={"experts": 256, "intermediate": 512})
    theirs = {"1": 17, "8": 18, "24": 19, "1024": 20, "4096": 21}
    path = tmp_path / "configs" / shape.table.file_name(GB10.name)
    path.parent.mkdir()
    path.write_text(json.dumps({key: {"BLOCK_SIZE_M": value} for key, value in theirs.items()}))
    monkeypatch.setattr("vllm_spark.kernels.fused_moe.shapes.kernel_source", lambda: tmp_path / "fused_moe.py")
    assert has_own_table(shape, GB10.name)
    assert not has_own_table(shape, "NVIDIA_H200")
    wanted = {int(key): {"BLOCK_SIZE_M": value} for key, value in theirs.items()}
    pinned = pinned_rows(shape, GB10.name, 8)
    for tokens in range(9, 6000):
        nearest = wanted[min(wanted, key=lambda known: abs(known - tokens))]
        assert FusedMoeTable({8: {}, **pinned}).row(tokens) == nearest, tokens
    (table,) = tables([fused(shape=shape)], {}, GB10, VERSIONS)
    assert isinstance(table, NewFusedMoeTable)
    assert {row.kind for row in table.provenance.rows.values()} == {"measured", "published"}


def test_experts_of_one_table_that_disagree_get_the_default() -> None:
    other = BF16.model_copy(update={"hidden": 4096})
    wide = ROW.model_copy(update={"BLOCK_SIZE_N": 64})
    outcomes = [fused(1), fused(2), fused(1, shape=other), fused(2, shape=other, parameters=wide)]
    (table,) = tables(outcomes, {BF16: ["a"], other: ["b"]}, GB10, VERSIONS)
    assert isinstance(table, NewFusedMoeTable)
    assert table.table.rows[1] == ROW.row()
    assert table.table.rows[2] == own_row(BF16, GB10.name, 2)
    assert table.provenance.rows[2].gain == 0.0
    assert table.provenance.models == ("a", "b")


def test_experts_of_earlier_runs_that_disagree_get_the_default(tmp_path: Path) -> None:
    other = BF16.model_copy(update={"hidden": 4096})
    wide = ROW.model_copy(update={"BLOCK_SIZE_N": 64})
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    journal.keep([Kept(fused(1, shape=other), ("b",)), Kept(fused(2, shape=other, parameters=wide), ("b",))])
    journal.keep([Kept(fused(1, shape=INT4, parameters=wide), ("c",))])
    (table,) = tables([fused(1), fused(2)], {BF16: ["a"]}, GB10, VERSIONS, journal.kept().values(), tmp_path)
    assert isinstance(table, NewFusedMoeTable)
    assert table.table.rows[1] == ROW.row()
    assert table.table.rows[2] == own_row(BF16, GB10.name, 2)
    assert table.provenance.models == ("a", "b")


def test_a_tile_for_groups_of_one_size_is_not_given_to_another() -> None:
    small = INT4.model_copy(update={"group_size": 32})
    outcomes = [fused(1, shape=INT4), fused(2, shape=INT4), fused(1, shape=small)]
    (table,) = tables(outcomes, {}, GB10, VERSIONS)
    assert isinstance(table, NewFusedMoeTable)
    assert table.table.rows[1] == ROW.row()
    assert table.table.rows[2] == own_row(INT4, GB10.name, 2)
    assert table.provenance.group_size is None


def test_rows_that_are_not_measured_anew_stay(tmp_path: Path) -> None:
    """By the journal, with what a decode step said of them, and by tables that came without their journal."""
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    long_ago = datetime.date(2026, 1, 2)
    old: list[Outcome] = [marlin(1), marlin(8).model_copy(update={"date": long_ago}), fused(1), fused(8)]
    old[3] = old[3].with_default()
    store(tables(old, {W13: ["a"], BF16: ["a"]}, GB10, VERSIONS), tmp_path)
    fast = ROW.model_copy(update={"num_warps": 8})
    new: list[Outcome] = [marlin(1, 0.7), fused(1, 0.7, fast)]
    for kept in ((), [Kept(outcome, ("a",)) for outcome in old]):
        journal.keep(kept)
        found = tables(new, {W13: ["b"], BF16: ["b"]}, GB10, VERSIONS, journal.kept().values(), tmp_path)
        table, moe = found
        assert isinstance(moe, NewFusedMoeTable)
        assert not isinstance(table, NewFusedMoeTable)
        gains = {rows: row.provenance and row.provenance.gain for rows, row in table.rows.items()}
        assert gains == {1: 0.3, **dict.fromkeys(range(2, 8)), 8: 0.1}
        assert table.rows[8].provenance is not None
        assert table.rows[8].provenance.date == long_ago
        assert (moe.table.rows[1], moe.table.rows[8]) == (fast.row(), own_row(BF16, GB10.name, 8))
        assert [row for row, source in moe.provenance.rows.items() if source.kind == "measured"] == [1, 8]
        assert set(table.models) == set(moe.provenance.models) == {"a", "b"}


def test_rows_of_other_versions_or_devices_do_not_stay(tmp_path: Path) -> None:
    old: list[Outcome] = [marlin(1), marlin(8), fused(1), fused(8)]
    store(tables(old, {W13: ["a"]}, GB10, {**VERSIONS, "driver": "580"}), tmp_path)
    table, moe = tables([marlin(1), fused(1)], {}, GB10, VERSIONS, (), tmp_path)
    assert isinstance(moe, NewFusedMoeTable)
    assert not isinstance(table, NewFusedMoeTable)
    assert set(table.rows) == {1}
    assert table.models == ()
    assert [row for row, source in moe.provenance.rows.items() if source.kind == "measured"] == [1]


def test_steps_between_measured_rows_are_vllms(tmp_path: Path) -> None:
    """Also where another run measured the other row: no step takes the row of a step that is only near."""
    store(tables([marlin(1), fused(1)], {}, GB10, VERSIONS), tmp_path)
    new = tables([marlin(8), fused(8)], {}, GB10, VERSIONS, (), tmp_path)
    table, moe = new
    assert isinstance(moe, NewFusedMoeTable)
    assert not isinstance(table, NewFusedMoeTable)
    for tokens in range(1, 9):
        tuned, row = tokens in (1, 8), table.row(tokens)
        assert row is not None
        assert row.leaves_tile == (not tuned)
        assert moe.table.row(tokens) == (ROW.row() if tuned else own_row(BF16, GB10.name, tokens))
    paths = store(new, tmp_path)
    assert [*check_marlin_table(paths[0]), *check_fused_moe_table(paths[1], None, None)] == []


def test_a_table_that_cannot_be_read_is_replaced_and_kept(tmp_path: Path) -> None:
    paths = store(tables([marlin(8), fused(8)], {}, GB10, VERSIONS), tmp_path)
    for path in paths:
        path.write_text("{")
    notes: list[str] = []
    assert store(tables([marlin(1), fused(1)], {}, GB10, VERSIONS, (), tmp_path), tmp_path, notes.append) == paths
    assert [path.with_name(path.name + ".bak").read_text() for path in paths] == ["{", "{"]
    assert len(notes) == 2


@pytest.mark.parametrize("kind", ["marlin", "fused_moe"])
def test_rows_of_somebody_elses_are_set_aside(tmp_path: Path, kind: str) -> None:
    outcome: Outcome = marlin(1) if kind == "marlin" else fused(1)
    new = tables([outcome], {}, GB10, VERSIONS)
    (path,) = store(new, tmp_path)
    noted = path if kind == "marlin" else fused_moe_table.provenance_path(path)
    notes: list[str] = []
    store(new, tmp_path, notes.append)
    assert notes == [], "all rows are a tuner's"
    theirs = noted.read_text().replace('"kind": "measured"', '"kind": "published", "source": "a forum"')
    for suffix in (".bak", ".bak1"):
        noted.write_text(theirs)
        before = path.read_text()
        store(new, tmp_path, notes.append)
        assert path.with_name(path.name + suffix).read_text() == before
        assert noted.with_name(noted.name + suffix).read_text() == theirs
        assert f"{path}{suffix}" in notes.pop()
        assert notes == []
    assert not list(tmp_path.rglob("*bak*.json")), "no table that is looked for"


def test_steps_below_the_smallest_row_are_vllms() -> None:
    (table,) = tables([fused(4)], {}, GB10, VERSIONS)
    assert isinstance(table, NewFusedMoeTable)
    for tokens in (1, 2, 3, 5):
        assert table.table.row(tokens) == own_row(BF16, GB10.name, tokens)
    assert table.table.row(4) == ROW.row()


def test_int4_leaves_open_what_vllm_completes() -> None:
    assert own_row(INT4, GB10.name, 1) == {"BLOCK_SIZE_M": 1, "GROUP_SIZE_M": 1, "SPLIT_K": 1}
    (table,) = tables([fused(shape=INT4)], {}, GB10, VERSIONS)
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
        assert own_row(shape, "NO_DEVICE", tokens) == theirs, tokens


# What is tried


@given(shape=experts(), rows=st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_the_space_has_only_what_can_run(shape: FusedMoeExperts, rows: int) -> None:
    space = search_space(shape, rows, GB10)
    assert len(set(space)) == len(space) < 120
    for row in space:
        assert (row.BLOCK_SIZE_M, row.GROUP_SIZE_M, row.SPLIT_K) == (16, 1, 1)
        if shape.dtype is None:
            assert (row.num_stages - 1) * (16 + row.BLOCK_SIZE_N) * row.BLOCK_SIZE_K * 2 <= GB10.shared_bytes
        if shape.block_shape is not None:
            assert row.BLOCK_SIZE_K <= 128, "the kernel cuts it to the block"
        if shape.is_int4:
            assert row.BLOCK_SIZE_K // shape.group_size in (1, 2, 4, 8)
            assert shape.hidden % row.BLOCK_SIZE_K == shape.intermediate % row.BLOCK_SIZE_K == 0
        assert max(shape.hidden, 2 * shape.intermediate) >= row.BLOCK_SIZE_N


@given(shape=experts())
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_space_passes_the_check(tmp_path: Path, shape: FusedMoeExperts) -> None:
    space = search_space(shape, 1, GB10)
    outcomes = [fused(rows, shape=shape, parameters=space[rows * len(space) // 9]) for rows in range(1, 9) if space]
    for table in tables(outcomes, {}, GB10, VERSIONS):
        (path,) = store([table], tmp_path)
        assert list(check_fused_moe_table(path, None, None)) == []


@pytest.mark.parametrize("shape", [BF16, FP8_BLOCK, FP8_CHANNEL])
def test_the_space_leaves_out_no_row_that_fits(shape: FusedMoeExperts) -> None:
    space = set(search_space(shape, 1, GB10))
    for size_n, size_k, warps, stages in itertools.product((32, 64, 128, 256), (64, 128), (4, 8), (2, 3, 4, 5)):
        row = FusedMoeParameters(
            BLOCK_SIZE_M=16, BLOCK_SIZE_N=size_n, BLOCK_SIZE_K=size_k, num_warps=warps, num_stages=stages
        )
        needed = shared_bytes(shape.table, row.row())
        assert needed is not None
        assert (row in space) == (needed <= GB10.shared_bytes)


def test_blocks_of_32_rows_are_tried_where_an_expert_may_have_them() -> None:
    assert {row.BLOCK_SIZE_M for row in search_space(BF16, 16, GB10)} == {16}
    assert {row.BLOCK_SIZE_M for row in search_space(BF16, 17, GB10)} == {16, 32}


def test_what_was_far_off_elsewhere_is_not_tried_again() -> None:
    fast, near, far, new = search_space(BF16, 1, GB10)[:4]
    known = [fused(tried=[(fast, 0.8), (near, 1.1), (far, 1.3)])]
    assert not_hopeless([fast, near, far, new], known) == [fast, near, new]
    assert not_hopeless([fast, near, far, new], []) == [fast, near, far, new]


needs_compiler = pytest.mark.skipif(compile.unavailable() is not None, reason=str(compile.unavailable()))


@needs_compiler
def test_what_does_not_compile_or_does_not_fit_is_left_out() -> None:
    good = ROW
    large = ROW.model_copy(update={"BLOCK_SIZE_N": 256, "BLOCK_SIZE_K": 256})
    odd = ROW.model_copy(update={"BLOCK_SIZE_N": 48})
    seen: list[None] = []
    trials = Trials(GB10, processes=2, seconds=400)
    assert trials.usable(BF16.table, [large, good, odd], lambda: seen.append(None)) == [good]
    assert len(seen) == 3
    assert trials.usable(FusedMoeShape(8, 256), [good], lambda: seen.append(None)) == [good]
    assert len(seen) == 3, "shapes of one format share their kernels"
    with pytest.raises(SparkError, match=r"not one of 1 kernels.*shared memory"):
        trials.usable(BF16.table, [large])


@needs_compiler
def test_a_compiler_that_takes_too_long_is_ended() -> None:
    trials = Trials(GB10, processes=1, seconds=0.01)
    with pytest.raises(SparkError, match=r"more than 0\.01 s to compile"):
        trials.usable(BF16.table, [ROW])


@needs_compiler
def test_kernels_of_4_bits_are_compiled_for_their_own_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    of_vllm = compile._constants
    monkeypatch.setattr(compile, "_constants", lambda *given: seen.append(of_vllm(*given)) or seen[-1])
    compile._compile.cache_clear()
    for int4 in (Int4(32), Int4(64, zero_points=True)):
        compiled = compile.compile_row(INT4.table, ROW.row(), (12, 1), int4=int4)
        assert compiled.registers > 0
        assert {(each["group_size"], each["has_zp"]) for each in seen} == {(int4.group_size, int4.zero_points)}
        seen.clear()


@needs_compiler
def test_both_kernels_of_a_decode_step_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    of_vllm = compile._constants
    monkeypatch.setattr(compile, "_constants", lambda *given: seen.append(of_vllm(*given)) or seen[-1])
    compile._compile.cache_clear()
    for shape, unsorted in ((BF16, {True, False}), (INT4, {False})):
        compile.compile_row(shape.table, ROW.row(), (12, 1))
        assert {each["naive_block_assignment"] for each in seen} == unsorted
        seen.clear()


@pytest.fixture
def compiler_that_hangs(tmp_path: Path) -> Iterator[Path]:
    """In place of Python: starts an assembler that does not end, and writes down the ids of both."""
    path, draft, ids = (tmp_path / name for name in ("python", "draft", "ids"))
    path.write_text(f"#!/bin/sh\nsleep 500 &\necho $$ $! > {draft}\nmv {draft} {ids}\nwait\n")
    path.chmod(0o755)
    yield path
    for process in map(int, ids.read_text().split()):
        if lives(process):
            os.kill(process, signal.SIGKILL)


def lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(120)
def test_what_a_slow_compiler_started_ends_with_it(
    tmp_path: Path, compiler_that_hangs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(compiler_that_hangs))
    with pytest.raises(SparkError, match="more than 3 s to compile"):
        Trials(GB10, processes=1, seconds=3).usable(BF16.table, [ROW])
    compiler, assembler = map(int, (tmp_path / "ids").read_text().split())
    wait_until(lambda: not lives(compiler))
    wait_until(lambda: not lives(assembler))


@pytest.mark.timeout(120)
def test_a_compiler_that_leaves_its_assembler_behind_is_not_waited_for(
    tmp_path: Path, compiler_that_hangs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler_that_hangs.write_text(compiler_that_hangs.read_text().removesuffix("wait\n"))
    monkeypatch.setattr(sys, "executable", str(compiler_that_hangs))
    with pytest.raises(SparkError, match="ended without a word"):
        Trials(GB10, processes=1, seconds=100).usable(BF16.table, [ROW])
    assembler = int((tmp_path / "ids").read_text().split()[1])
    wait_until(lambda: not lives(assembler))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_compilers_end_with_the_tuner(tmp_path: Path, compiler_that_hangs: Path, number: signal.Signals) -> None:
    program = """
import sys
from vllm_spark.cli.tune_model import _ended_in_order
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, FusedMoeParameters
from vllm_spark.tune.fused_moe.trial import Trials
from vllm_spark.kernels.devices import GB10
sys.executable = sys.argv[1]
row = FusedMoeParameters(BLOCK_SIZE_M=16, BLOCK_SIZE_N=32, BLOCK_SIZE_K=128, num_warps=4, num_stages=4)
with _ended_in_order():
    Trials(GB10, processes=1, seconds=100).usable(FusedMoeExperts(
        experts=8, top_k=2, hidden=256, intermediate=256).table, [row])
"""
    with subprocess.Popen([sys.executable, "-c", program, str(compiler_that_hangs)]) as tuner:
        wait_until((tmp_path / "ids").exists)
        compiler, assembler = map(int, (tmp_path / "ids").read_text().split())
        tuner.send_signal(number)
        code = tuner.wait(30)
        wait_until(lambda: not lives(compiler))
        if number == signal.SIGTERM:  # by SIGKILL, the kernel ends the compiler alone, and not what that started
            assert code == 128 + number
            wait_until(lambda: not lives(assembler))


# What wins


@dataclasses.dataclass(frozen=True)
class Timed:
    """A problem whose calls take known times."""

    cost: Mapping[str | None, float]
    rounds: list[tuple[list[str | None], int]] = dataclasses.field(default_factory=list)

    def run(self, parameters: str | None) -> None:
        raise AssertionError("its times are known")

    def call(self, call: int, parameters: str | None) -> torch.Tensor:
        raise AssertionError("its times are known")


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def race(problem: Timed, candidates: list[str | None], rounds: int) -> Times[str | None]:
        problem.rounds.append((list(candidates), rounds))
        return Times({each: [problem.cost[each]] * rounds for each in candidates})

    monkeypatch.setattr(search, "_race", race)


@pytest.mark.usefixtures("known_times")
def test_a_winner_wins_with_other_routings_too() -> None:
    first = Timed({None: 10.0, "a": 9.0, "b": 8.0})
    found = search.find(first, Timed({None: 10.0, "b": 9.0}), None, ["a", "b"], 10)
    assert (found.parameters, found.default_us, found.tuned_us, found.ratio) == ("b", 10.0, 9.0, 0.9)
    assert found.tried == {"a": 0.9, "b": 0.8}
    lucky = search.find(first, Timed({None: 10.0, "b": 9.9}), None, ["a", "b"], 10)
    assert (lucky.parameters, lucky.tuned_us, lucky.ratio) == (None, 10.0, 1.0)


@pytest.mark.usefixtures("known_times")
def test_without_a_clear_winner_or_any_candidate_the_default_stays() -> None:
    found = search.find(Timed({None: 10.0, "a": 9.85}), Timed({None: 10.0, "a": 5.0}), None, ["a"], 10)
    assert found.parameters is None
    found = search.find(Timed({None: 10.0}), Timed({None: 10.0}), None, [], 10)
    assert (found.parameters, found.tried) == (None, {})


@pytest.mark.usefixtures("known_times")
def test_of_many_the_slow_are_measured_in_few_rounds_alone() -> None:
    names = [f"{number:02}" for number in range(40)]
    cost: dict[str | None, float] = {None: 10.0} | {name: 8.0 + 0.1 * number for number, name in enumerate(names)}
    problem = Timed(cost)
    found = search.find(problem, Timed(cost), None, names, 20)
    (all_of_them, few), (rest, many) = problem.rounds
    assert set(all_of_them) == {None, *names}
    assert (few < many, many) == (True, 20)
    assert rest == [None, *names[:21]], "within 1.25 of the fastest"
    assert set(found.tried) == set(names)
    assert found.parameters == "00"


class Event:
    """Of a stream whose kernels are done when `done` says so."""

    done = False

    def record(self) -> None: ...

    def query(self) -> bool:
        return self.done


@dataclasses.dataclass(frozen=True)
class Ready:
    """A problem whose kernels are enqueued, and then do what the test says."""

    error: Exception | None = None

    def run(self, parameters: object) -> None:
        if self.error is not None:
            raise self.error

    def call(self, call: int, parameters: object) -> torch.Tensor:
        return torch.empty(0)


def test_a_kernel_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait() -> None:
        raise AssertionError("that would wait without end")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "empty_cache", wait)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=10))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 100))
    monkeypatch.setattr(timing, "LONGEST_RUN", 0.02)
    why = r"did not end within 0\.02 s, with 'these'"
    with pytest.raises(HangError, match=why) as caught, search.cold_layers(str, 1, 10, "small experts"):
        search.runs(Ready(), "these", "Marlin")
    assert caught.value.parameters == "these"
    monkeypatch.setattr(Event, "done", True)
    assert search.runs(Ready(), "these", "Marlin")


class EndlessWait(Exception):
    """What waits for the GPU without a bound."""


def endless_wait() -> None:
    raise EndlessWait


class Stream:
    """What replays of a GPU's graphs put on it, in their order; it stops for good at the first that hangs."""

    def __init__(self) -> None:
        self.hung = False

    def event(self, enable_timing: bool = False) -> SimpleNamespace:
        event = SimpleNamespace(comes=False)

        def record() -> None:
            event.comes = not self.hung

        event.record, event.query, event.elapsed_time = record, lambda: event.comes, lambda end: 1.0
        return event

    def captured(self, name: str, body: Callable[[], None]) -> SimpleNamespace:
        replays = 0

        def replay() -> None:
            nonlocal replays
            replays += 1
            self.hung |= (name, replays) == ("the second", 2)

        return SimpleNamespace(replay=replay)


def test_a_kernel_that_hangs_in_a_race_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended when it was tried, and does not in a later round; those after it on the stream do not come either."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "synchronize", endless_wait)
    monkeypatch.setattr(timing, "_captured", stream.captured)
    monkeypatch.setattr(timing, "LONGEST_RUN", 0.02)
    names = ["the first", "the second", "the third"]
    with pytest.raises(HangError) as caught:
        timing.time_in_turns({name: lambda: None for name in names}, 1, 3)
    assert caught.value.parameters == "the second"


def test_a_kernel_that_hangs_after_its_call_failed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", endless_wait)
    monkeypatch.setattr(timing, "LONGEST_RUN", 0.02)
    refused = SimpleNamespace(call=lambda call, parameters: 1 / 0)
    with pytest.raises(HangError) as caught:
        search.runs(refused, "these", "Marlin")
    assert caught.value.parameters == "these"
    monkeypatch.setattr(Event, "done", True)
    assert not search.runs(refused, "these", "Marlin")


@pytest.mark.parametrize(("ends", "error"), [(True, KeyboardInterrupt), (False, HangError)])
def test_ctrl_c_counts_when_the_kernel_is_done(
    ends: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        monkeypatch.setattr(Event, "done", ends)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "LONGEST_RUN", 0.02)
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(error):
        timing.wait_for_kernels("these")


def test_ctrl_c_in_a_race_counts_when_all_its_kernels_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """On its way out the process frees memory, which waits for what still runs."""
    waiting: list[SimpleNamespace] = []

    def event(enable_timing: bool = False) -> SimpleNamespace:
        new = SimpleNamespace(done=False, record=lambda: None)
        new.query = lambda: new.done
        waiting.append(new)
        return new

    def sleep(seconds: float) -> None:
        next(each for each in waiting if not each.done).done = True
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(timing, "_captured", lambda name, body: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        timing.time_in_turns({name: lambda: None for name in "abcd"}, 1, 3)
    ends = waiting[1::2]
    assert len(ends) == 4
    assert all(each.done for each in ends)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.cuda.OutOfMemoryError("Tried to allocate\n2 GiB"), "^the GPU has no memory left for the search"),
        (RuntimeError("\n CUDA error: misaligned\nmore"), "with another routing: CUDA error: misaligned$"),
    ],
)
def test_a_kernel_that_fails_while_it_is_timed_costs_a_sentence(
    error: Exception, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "time_in_turns", lambda bodies, calls, rounds: [body() for body in bodies.values()])
    with pytest.raises(SparkError, match=why):
        search.find(Ready(error), Ready(error), None, ["a"], 2)


def test_a_search_goes_on_without_what_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = marlin_search.search_space(W13, 1, GB10)
    raced: list[Any] = []

    def runs(problem: Any, parameters: Any, kernel: str) -> bool:
        if parameters == space[1]:
            raise HangError(parameters)
        return True

    def find(problem: Any, others: Any, default: Any, candidates: list[Any], rounds: int) -> search.Found[Any]:
        raced.extend(candidates)
        return search.Found(default, 1.0, 1.0, 1.0, {})

    monkeypatch.setattr(marlin_search, "runs", runs)
    monkeypatch.setattr(marlin_search, "find", find)
    monkeypatch.setattr(marlin_search, "MarlinProblem", lambda *given, seed: None)
    monkeypatch.setattr(marlin_search, "weights_of", lambda shape, on_note: contextlib.nullcontext([]))
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    with pytest.raises(HangError):
        run_tuner([W13], (1,), GB10, journal, lambda outcome: None)
    assert journal.hung() == {space[1]}
    assert len(run_tuner([W13], (1,), GB10, journal, lambda outcome: None)) == 1
    assert raced == [each for each in space if each != space[1]]


def test_vllms_own_choice_is_not_left_out_when_it_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is compared with it."""

    def find(*given: Any) -> None:
        raise HangError(MARLIN_DEFAULT)

    monkeypatch.setattr(marlin_search, "runs", lambda *given: True)
    monkeypatch.setattr(marlin_search, "find", find)
    monkeypatch.setattr(marlin_search, "MarlinProblem", lambda *given, seed: None)
    monkeypatch.setattr(marlin_search, "weights_of", lambda shape, on_note: contextlib.nullcontext([]))
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    with pytest.raises(HangError):
        run_tuner([W13], (1,), GB10, journal, lambda outcome: None)
    assert journal.hung() == set()


@pytest.mark.parametrize(
    ("parameters", "further"),
    [
        ("'this tile'", "it is noted in {folder}, and the same command goes on without it."),
        ("None", "that is vLLM's own choice, and without it there is nothing to compare with"),
    ],
)
def test_a_process_whose_gpu_is_stuck_ends_at_once(tmp_path: Path, parameters: str, further: str) -> None:
    program = """
import atexit, sys, time
from pathlib import Path
from vllm_spark.cli.tune_model import _end_at_once
from vllm_spark.tune.timing import HangError
atexit.register(time.sleep, 500)
print("before", flush=False)
_end_at_once(HangError(PARAMETERS), Path(sys.argv[1]))
""".replace("PARAMETERS", parameters)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (1, "before\n")
    assert f"with {parameters}; {further.format(folder=tmp_path)}" in done.stderr


def test_vllms_override_ends_when_a_kernel_fails() -> None:
    vllm = pytest.importorskip("vllm.model_executor.layers.fused_moe")
    from vllm_spark.tune.fused_moe.problem import _overriding

    inside = []

    def fail() -> None:
        with _overriding(ROW.row()):
            inside.append(vllm.get_config())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert inside == [ROW.row()]
    assert vllm.get_config() is None
    with _overriding(ROW.row()):
        pass
    assert vllm.get_config() is None


@pytest.mark.parametrize(("free", "expected"), [(100, 3), (99, 3), (3, 2)])
def test_a_gpu_with_little_room_is_noted(monkeypatch: pytest.MonkeyPatch, free: int, expected: int) -> None:
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=10))
    monkeypatch.setattr(cuda, "mem_get_info", lambda: (free, 100))
    notes: list[str] = []
    with search.cold_layers(str, 1, 10, "small experts", notes.append) as layers:
        assert len(layers) == expected
    assert [("2 of 3 layers of small experts" in note) for note in notes] == [True] * (expected < 3)


def test_routing_is_skewed_and_the_same_everywhere() -> None:
    weights, chosen = route(4096, 128, 8, seed=3)
    assert torch.equal(chosen, route(4096, 128, 8, seed=3)[1])
    assert all(len(set(token.tolist())) == 8 for token in chosen[:64])
    assert torch.allclose(weights.sum(dim=1), torch.ones(4096))
    counts = torch.bincount(chosen.flatten(), minlength=128).sort(descending=True).values
    assert counts[:26].sum() > 0.35 * counts.sum(), "a fifth of the experts gets far more than a fifth"


# Models


def shipped(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((configs_folder() / "models" / name / "config.json").read_text())
    return config


def tuned(name: str, tp: int, quantization: dict[str, Any] | None = None) -> TunedModel:
    config = shipped(name)
    if quantization is not None:
        config["quantization_config"] = quantization
    return TunedModel(name, tp, layers_as_served(config, tp))


@pytest.mark.parametrize(
    ("name", "tp", "experts", "top_k", "sizes", "group_size"),
    [
        ("qwen3-30b-a3b-int4", 1, 128, 8, [(1536, 2048), (2048, 768)], 128),
        ("qwen3-30b-a3b-int4", 2, 128, 8, [(768, 2048), (2048, 384)], 128),
        ("qwen3-235b-a22b-int4", 2, 128, 8, [(1536, 4096), (4096, 768)], 128),
        ("qwen3-next-80b-a3b-int4", 2, 512, 10, [(512, 2048), (2048, 256)], 128),
        ("minimax-m2-int4", 2, 256, 8, [(1536, 3072), (3072, 768)], 128),
        ("glm-4.5-air-int4", 1, 128, 8, [(2816, 4096), (4096, 1408)], 128),
        # 704 inputs of a rank are 5.5 groups of 128.
        ("glm-4.5-air-int4", 2, 128, 8, [(1408, 4096), (4096, 704)], 64),
    ],
)
def test_gemms_of_int4_experts(
    name: str, tp: int, experts: int, top_k: int, sizes: list[tuple[int, int]], group_size: int
) -> None:
    shapes = marlin_shapes(tuned(name, tp))
    assert [shape.kernel for shape in shapes] == ["moe_w13", "moe_w2"]
    assert [(shape.size_n, shape.size_k) for shape in shapes] == sizes
    assert {(shape.experts, shape.top_k, shape.group_size) for shape in shapes} == {(experts, top_k, group_size)}


def test_gemms_of_int4_experts_are_those_after_vllms_padding() -> None:
    weights = Int4(group_size=32)
    layer = Experts("mlp.experts", 8, 2, hidden=256, intermediate=736, count=1, weights=weights)
    sizes = [(shape.size_n, shape.size_k) for shape in marlin_shapes(TunedModel("a", 1, [layer]))]
    assert sizes == [(1536, 256), (256, 768)]


def test_which_kernels_are_tuned() -> None:
    int4 = tuned("qwen3-30b-a3b-int4", 2)
    assert shapes_of(int4, "auto") == shapes_of(int4, "marlin") == marlin_shapes(int4)
    assert shapes_of(int4, "triton") == [INT4]
    for quantization, shape in (
        ({}, BF16),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, FP8_BLOCK),
        ({"quant_method": "fp8"}, FP8_CHANNEL),
    ):
        other = tuned("qwen3-30b-a3b-int4", 2, quantization)
        assert shapes_of(other, "auto") == shapes_of(other, "triton") == [shape]
        assert shapes_of(other, "marlin") == []


@pytest.mark.parametrize("name", ["llama-3.3-70b-int4", "qwen3-32b-int4", "gpt-oss-120b"])
def test_models_with_nothing_to_tune(name: str) -> None:
    for tp in (1, 2):
        assert shapes_of(tuned(name, tp), "auto") == shapes_of(tuned(name, tp), "triton") == []


@pytest.mark.parametrize(
    ("quantization", "why"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "704 are no whole number of blocks of 128 x 128"),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, "and these have none"),
    ],
)
def test_experts_that_triton_does_not_take(quantization: dict[str, Any], why: str) -> None:
    model = tuned("glm-4.5-air-int4", 2, quantization)
    with pytest.raises(ConfigurationError, match=why):
        fused_moe_shapes(model, int4=True)


def test_which_tables_vllm_reads_by_itself() -> None:
    assert not_read_by_default(FP8_CHANNEL) is None
    for shape, theirs in ((INT4, "Marlin"), (FP8_BLOCK, "DeepGEMM"), (BF16, "FlashInfer")):
        assert theirs in str(not_read_by_default(shape))


@pytest.mark.parametrize("name", sorted(path.name for path in (configs_folder() / "models").iterdir()))
def test_a_shard_as_a_model_has_the_sizes_of_a_rank(name: str) -> None:
    config = shipped(name)
    before = json.dumps(config)
    shard = shard_as_model(config, 2)
    assert json.dumps(config) == before, "the given one stays as it was"
    assert shard_as_model(config, 1) == config
    text, of_rank = config.get("text_config", config), shard.get("text_config", shard)
    assert of_rank["num_attention_heads"] * 2 == text["num_attention_heads"]
    assert of_rank["hidden_size"] == text["hidden_size"]
    from vllm_spark.models.layers import model_layers

    def sizes(layers: Sequence[Any]) -> list[tuple[str, int, int]]:
        """Without the small projection of linear attention, which vLLM keeps whole on every rank for some formats."""
        return [
            (layer.name, layer.hidden, layer.intermediate)
            if isinstance(layer, Experts)
            else (layer.name, layer.size_n, layer.size_k)
            for layer in layers
            if not layer.name.endswith("in_proj_ba")
        ]

    assert sizes(model_layers(shard, 1)) == sizes(model_layers(config, 2))


def test_a_shard_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"num_attention_heads is 32, which 3 ranks cannot share.*--tp"):
        shard_as_model(shipped("qwen3-30b-a3b-int4"), 3)


@pytest.mark.parametrize(("tp", "heads"), [(2, 4), (4, 2), (8, 1)])
def test_a_rank_has_a_key_value_head_where_there_are_fewer_than_ranks(tp: int, heads: int) -> None:
    config = {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": heads}
    assert shard_as_model(config, tp)["num_key_value_heads"] == max(heads // tp, 1)
    with pytest.raises(ConfigurationError, match="num_key_value_heads is 3, which 4 ranks cannot share"):
        shard_as_model({"num_key_value_heads": 3}, 4)


# Decode steps


def test_a_decode_steps_sides_take_turns_and_see_no_other_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    ran: list[tuple[int, str]] = []

    def run(
        name: str, candidate: decode.Candidate, model: Path, given: decode.Settings, stage: Any, number: int
    ) -> Result:
        ran.append((number, name))
        environment = decode._environment(given, candidate, 0)
        assert "VLLM_TUNED_CONFIG_FOLDER" not in environment
        assert environment["XDG_CONFIG_HOME"] == "mine"
        return Result("0.32.0", 1.0, {1: [float(len(ran))] * given.steps}, {1: [[1]]}, {1: [[(1, 0.0)]]}, None)

    monkeypatch.setattr(decode, "_run", run)
    monkeypatch.setattr(decode, "_visible_gpus", lambda: ["0"])
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    environment = {"XDG_CONFIG_HOME": "mine"}
    given = decode.Settings("cuda", str(tmp_path), decode.TUNING, (1,), rounds=4, environment=environment)
    with process_group("test", Console(file=(tmp_path / "out").open("w"))) as stage:
        report = decode.measure(given, stage, lambda name, number: None)
    untuned, tuned = decode.TUNING
    names = [untuned, tuned, tuned, untuned] * 2
    assert ran == [(index // 2, name) for index, name in enumerate(names)]
    assert [row.medians for row in report.rows] == [[1.0, 4.0, 5.0, 8.0], [2.0, 3.0, 6.0, 7.0]]
    assert "VLLM_TUNED_CONFIG_FOLDER" in decode._environment(given, decode.candidates_for("cuda")["tp1"], 0)


def test_each_size_has_its_own_logs_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from vllm_spark.tune import decode_comparison

    seen: list[tuple[Path, float]] = []

    def compare(given: Any, stage: Any, on_engine: Any, on_note: Callable[[str], None]) -> list[Any]:
        seen.append((stage.logs, given.timeout))
        on_note("an engine failed at its end")
        return []

    monkeypatch.setattr(decode_comparison, "compare", compare)
    parser = argparse.ArgumentParser()
    tune_model.add_arguments(parser)
    args = parser.parse_args(["any", "--keep-logs", str(tmp_path / "logs"), "--timeout", "77"])
    with (tmp_path / "out").open("w") as file:
        for tp in (1, 2):
            tune_model._compare({}, TunedModel("any", tp, []), {}, [], args, Console(file=file))
    assert seen == [(tmp_path / "logs" / "tp1", 77), (tmp_path / "logs" / "tp2", 77)]
    assert (tmp_path / "out").read_text().count("NOTE: an engine failed at its end") == 2


BOTH_SIZES = [(TunedModel("a", tp, []), [shape]) for tp, shape in ((1, W13), (2, BF16))]
LABELS: dict[Any, list[str]] = {W13: ["a TP=1"], BF16: ["a TP=2"]}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SparkError("an engine failed")])
def test_what_one_size_found_outlives_the_end_of_the_next(tmp_path: Path, error: BaseException) -> None:
    from rich.console import Console

    journal = Journal(tmp_path, GB10.name, VERSIONS)
    compared: list[int] = []

    def judge(model: TunedModel, its: Any, candidates: Any) -> dict[int, float]:
        compared.append(model.tp)
        if model.tp == 2:
            raise error
        # Another tuner's results came while this one decoded.
        journal.keep([Kept(marlin(8), ("b TP=1",))])
        return {1: 0.9}

    def tables_of(mine: list[Outcome]) -> list[Any]:
        return tables(mine, LABELS, GB10, VERSIONS, journal.kept().values(), tmp_path)

    console = Console(width=500, record=True, file=(tmp_path / "out").open("w"))
    with pytest.raises(type(error)):
        tune_model._keep([marlin(), fused()], BOTH_SIZES, LABELS, tables_of, judge, journal, tmp_path, console)
    assert compared == [1, 2]
    assert {(shape, rows) for shape, rows in journal.kept()} == {(W13, 1), (W13, 8)}
    path = tmp_path / "marlin" / W13.file_name(GB10.name)
    table = load_marlin_table(path)
    assert [number for number, row in table.rows.items() if not row.leaves_tile] == [1, 8]
    assert set(table.models) == {"a TP=1", "b TP=1"}
    printed = console.export_text()
    assert f"Written: {path}" in printed
    assert ("Stopped: tables for 1 of 2 sizes are written" in printed) == isinstance(error, KeyboardInterrupt)


# The report


def test_a_report_has_a_table_for_each_kernel_and_a_plot(tmp_path: Path) -> None:
    from rich.console import Console

    pytest.importorskip("matplotlib")
    outcomes: list[Outcome] = [marlin(1), marlin(8), fused(1), fused(8, 1.0, None, tried=()), fused(shape=INT4)]
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    for table in outcomes_tables(outcomes, "NVIDIA GB10"):
        console.print(table)
    text = console.export_text()
    for part in ("64 x 128, 2 blocks/SM", "16 x 32 x 128, 4 warps, 4 stages", "default", "0.900", "bfloat16", "int4"):
        assert part in text
    assert [str(table.title).split(",")[0] for table in outcomes_tables(outcomes[:2], "")] == ["Marlin"]
    path = tmp_path / "plot.png"
    plot(outcomes, "NVIDIA GB10", path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(SparkError, match=r"plot\.png cannot be written \(No space left.*--plot"):
        plot(outcomes, "NVIDIA GB10", path)


# The command


def tune(*words: str) -> int:
    parser = argparse.ArgumentParser()
    tune_model.add_arguments(parser)
    return tune_model.run(parser.parse_args(words))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Folder with a config.json of each kind that is asked for below."""
    known = shipped("qwen3-30b-a3b-int4")
    for name, content in {
        "unknown": {"model_type": "mamba9", "num_hidden_layers": 2},
        "list": [1, 2],
        "awq": {**known, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
        "dense": {**known, "num_experts": 8, "num_experts_per_tok": 8},
        "gguf": {**known, "quantization_config": {"quant_method": "gguf"}},
        "ordered": {**known, "quantization_config": {**known["quantization_config"], "desc_act": True}},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    for name, text in (("broken", '{"model_type":'), ("deep", "[" * 100_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        (tmp_path / name / "model").mkdir(parents=True)
        unquantized = {key: value for key, value in known.items() if key != "quantization_config"}
        (tmp_path / name / "model" / "config.json").write_text(json.dumps(unquantized))
        (tmp_path / name / "model" / name).write_text('{"bits": 4}')
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["{models}/unknown"], ["mamba9", "known are", "qwen3_moe"]),
        (["{models}/broken"], ["broken/config.json", "is no JSON"]),
        (["{models}/list"], ["holds no JSON object"]),
        (["{models}/deep"], ["deep/config.json", "is no JSON"]),
        (["x" * 300], ["x" * 300, "File name too long", "qwen3-30b-a3b-int4"]),
        (
            ["{models}/quantize_config.json/model"],
            ["quantize_config.json may say how the weights are quantized", "as quantization_config"],
        ),
        (["{models}/quant_config.json/model"], ["quant_config.json may say how the weights are quantized"]),
        (["{models}/hf_quant_config.json/model"], ["hf_quant_config.json may say how the weights are quantized"]),
        (["{models}/gguf"], ["gguf", "gptq"]),
        (["./no/such/model"], ["./no/such/model", "qwen3-30b-a3b-int4"]),
        (["qwen3-30b-a3b-int4", "--tp", "5"], ["5 ranks"]),
        (["llama-3.3-70b-int4"], ["nothing to tune in llama-3.3-70b-int4"]),
        (["gpt-oss-120b", "--kernels", "triton"], ["nothing to tune in gpt-oss-120b"]),
        (["{models}/awq", "--kernels", "triton"], ["AWQ", "--kernels triton"]),
        (["{models}/ordered", "--kernels", "triton"], ["desc_act", "--kernels triton"]),
        (["qwen3-30b-a3b-int4", "--out", "{models}/file/tuned"], ["file/tuned cannot be written", "--out"]),
        (["qwen3-30b-a3b-int4", "--out", "{models}/file"], ["file cannot be written", "--out"]),
        (["qwen3-30b-a3b-int4", "--out", "{models}/new", "--plot", "{models}/nowhere/plot.png"], ["nowhere/plot.png"]),
        (["qwen3-30b-a3b-int4", "--out", "{models}/new", "--keep-logs", "{models}/file/x"], ["file/x", "--keep-logs"]),
        (["{models}/dense", "--out", "{models}/new", "--rows", "8"], ["for 8 tokens", "leave --rows out"]),
    ],
)
def test_bad_input_costs_a_sentence(models: Path, words: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        tune(*(word.format(models=models) for word in words))
    assert caught.value.exit_code == 2
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence
    assert not (models / "new").exists(), "nothing is made for a command that fails"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--rows", "9"], "9 is more than 8 tokens"),
        (["--rows", "0"], "'0' is no whole number above 0"),
        (["--tp", "two"], "'two' is no whole number above 0"),
        (["--tp", "0"], "'0' is no whole number above 0"),
        (["--kernels", "cutlass"], "cutlass"),
        (["--engine", "{"], "is no JSON object"),
        (["--out=~nobody-of-this-name/x"], "no home folder for '~nobody-of-this-name/x'"),
    ],
)
def test_bad_options_are_explained(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tune("qwen3-30b-a3b-int4", *words)
    assert caught.value.code == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--plot", "--keep-logs"])
def test_a_home_folder_is_found_where_the_shell_does_not_look(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    parser = argparse.ArgumentParser()
    tune_model.add_arguments(parser)
    given = vars(parser.parse_args(["any", f"{option}=~/x"]))
    assert given[option.removeprefix("--").replace("-", "_")] == Path("/home/of/mine/x")


def test_a_shard_that_cannot_be_made_is_said_before_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any, tp: int) -> None:
        raise ConfigurationError("it does not divide")

    monkeypatch.setattr("vllm_spark.models.shard.shard_as_model", refuse)
    words = ["qwen3-30b-a3b-int4", "--out", str(tmp_path / "new")]
    with pytest.raises(ConfigurationError, match="does not divide"):
        tune(*words)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["{private}/model"], "private/model cannot be read (Permission denied); give"),
        (
            ["qwen3-30b-a3b-int4", "--out", "{private}/tuned"],
            "private/tuned cannot be written (Permission denied); give",
        ),
    ],
)
def test_a_folder_without_rights_costs_a_sentence(tmp_path: Path, words: list[str], part: str) -> None:
    private = tmp_path / "private"
    private.mkdir()
    with no_entry(private), pytest.raises(ConfigurationError, match=re.escape(part)):
        tune(*(word.format(private=private) for word in words))


def test_a_check_does_not_pass_over_tables_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "private" / "tuned").mkdir(parents=True)
    assert tune_command._may_be_there(tmp_path / "private" / "tuned")
    assert not tune_command._may_be_there(tmp_path / "private" / "other")
    with no_entry(tmp_path / "private"):
        assert tune_command._may_be_there(tmp_path / "private" / "tuned")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("words", [[], ["--kernels", "triton"]])
def test_a_machine_without_a_gpu_is_told(tmp_path: Path, words: list[str]) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(ConfigurationError, match="needs a GPU") as caught:
        tune("qwen3-30b-a3b-int4", "--out", str(tmp_path / "new"), *words)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "new").exists()


def test_errors_come_before_anything_slow(tmp_path: Path) -> None:
    program = """
import argparse, sys
from vllm_spark.cli import tune as tune_command
from vllm_spark.cli import tune_model
from vllm_spark.errors import ConfigurationError
parser = argparse.ArgumentParser()
tune_model.add_arguments(parser)
try:
    tune_model.run(parser.parse_args(["qwen3-30b-a3b-int4", "--out", sys.argv[1]]))
except ConfigurationError as error:
    print(error)
print([name for name in ("torch", "vllm", "triton") if name in sys.modules])
"""
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "file")], capture_output=True, text=True, timeout=300, check=True
    )
    sentence, loaded = done.stdout.splitlines()
    assert "cannot be written" in sentence
    assert loaded == "[]"


def test_the_flag_that_makes_vllm_read_a_table_is_told() -> None:
    told = who_reads([W13, FP8_CHANNEL, INT4])
    assert len(told) == 1
    assert "--moe-backend triton" in told[0]
    assert "int4" in told[0]
    assert backend([INT4]) == {"moe_backend": "triton"}
    assert backend([W13, BF16]) == {}


def test_whether_triton_runs_int4_experts_is_what_vllm_says() -> None:
    vllm = pytest.importorskip("vllm.model_executor.layers.fused_moe.oracle.int_wna16")
    from vllm_spark.compat.versions import triton_runs_int4_experts

    if triton_runs_int4_experts():
        assert vllm.map_wna16_backend("triton").value == "TRITON"
        check_version_takes_int4([INT4])
    else:
        with pytest.raises(ValueError, match="not supported"):
            vllm.map_wna16_backend("triton")
        with pytest.raises(ConfigurationError, match="runs int4 experts on Marlin alone"):
            check_version_takes_int4([INT4])


def test_fused_moe_tables_are_beside_their_provenance(tmp_path: Path) -> None:
    (path,) = store(tables([fused()], {}, GB10, VERSIONS), tmp_path)
    assert path.name == "E=128,N=384,device_name=NVIDIA_GB10.json"
    assert fused_moe_table.provenance_path(path).is_file()
    assert json.loads(path.read_text())["triton_version"] == "3.8.0"
