"""The journal of a search: what it keeps, and what a broken line, a full disk or a second tuner costs."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from vllm_spark.errors import ConfigurationError, SparkError
from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.fused_moe import compile
from vllm_spark.tune.journal import FILE, Journal, Kept, installed_versions
from vllm_spark.tune.results import (
    Outcome,
)

from .tuning_outcomes import (
    BF16,
    INT4,
    ROW,
    TILE,
    VERSIONS,
    W13,
    fused,
    marlin,
)


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
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).symlink_to("/dev/full")
    with pytest.raises(SparkError, match=r"journal\.jsonl cannot be written \(No space left.*make room"):
        journal.add(marlin())


def test_what_was_kept_is_apart_from_what_was_searched(tmp_path: Path) -> None:
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    journal.add(marlin())
    assert journal.kept() == {}
    journal.add_kept([Kept(marlin().with_default(), ("a",))])
    journal.add_kept([Kept(marlin().with_default(), ("b",))])
    assert journal.known() == {(W13, 1): marlin()}, "the search is not made again"
    assert journal.kept() == {(W13, 1): Kept(marlin().with_default(), ("a", "b"))}


def test_two_tuners_are_kept_apart(tmp_path: Path) -> None:
    first, second = (Journal(tmp_path, GB10.name, VERSIONS) for _ in range(2))
    with first.exclusive():
        with pytest.raises(SparkError, match="another vllm-spark tune is running in"), second.exclusive():
            pass
        second.add(marlin())
    with second.exclusive():
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
