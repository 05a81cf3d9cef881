"""The launch table: what `bench calibrate` writes is what serving reads, and nothing else passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_spark.collective import LaunchShape
from vllm_spark.collective.launch_table import LaunchTable, default_path, load_launch_table, store_launch_table
from vllm_spark.errors import ConfigurationError

from .folder_rights import no_entry

TABLE = LaunchTable("some GPU", "proxied", 16, LaunchShape(payload_blocks=48, dependent_launch=False))


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def test_what_is_written_is_found() -> None:
    path = default_path()
    assert path is not None
    assert load_launch_table(None) == LaunchTable(), "without a file: the defaults"
    store_launch_table(TABLE, path)
    assert load_launch_table(None) == TABLE
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_named_file_comes_first(tmp_path: Path) -> None:
    store_launch_table(TABLE, tmp_path / "new" / "other.json")
    store_launch_table(LaunchTable("another"), tmp_path / "vllm-spark" / "launch.json")
    assert load_launch_table(tmp_path / "new" / "other.json") == TABLE


def test_the_limit_of_packets() -> None:
    """The user's choice beats the table's, which counts on its own path only and within a slot."""
    assert TABLE.packet_bytes(None, 1024, "proxied") == 16 << 10
    assert TABLE.packet_bytes(None, 1024, "direct") is None
    assert TABLE.packet_bytes(None, 8, "proxied") == 8 << 10
    assert TABLE.packet_bytes(2, 1024, "direct") == 2 << 10
    assert LaunchTable().packet_bytes(None, 1024, "proxied") is None


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"[]", "should be an object"),
        (b"\xff", "invalid JSON"),
        (b"", "invalid JSON"),
        (b'{"packet_kib": 99999}', "1024"),
        (b'{"packets_kib": 9}', "packets_kib: unknown field; give"),
        (b'{"shape": {"packet_threads": 9}}', "packet_threads 9"),
    ],
)
def test_other_content(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=part) as caught:
        load_launch_table(path)
    assert str(path) in str(caught.value)
    assert "--spark-launch-table" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        load_launch_table(tmp_path / "missing")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        store_launch_table(TABLE, Path("/proc/nowhere/launch.json"))


def test_a_folder_that_may_not_be_entered(tmp_path: Path) -> None:
    """Whether a table is in it, nobody knows."""
    with no_entry(tmp_path), pytest.raises(ConfigurationError) as caught:
        load_launch_table(None)
    assert "launch.json cannot be read (Permission denied); give another with --spark-launch-table" in str(caught.value)


def test_without_a_folder_there_is_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    assert load_launch_table(None) == LaunchTable()
