"""Files that a user names and that are pipes, devices or too long: one sentence each, and no read without an end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_spark.files import open_regular, read_regular

READERS = {
    "launch table": "from vllm_spark.collective.launch_table import load_launch_table as read",
    "wire model": "from vllm_spark.collective.link_model import load_wire_model as read",
    "FusedMoE table": "from vllm_spark.kernels.fused_moe.table import load_fused_moe_table as read",
    "--config": "from vllm_spark.entrypoints.command_line import _read_config_file\n"
    "def read(path): raise ValueError(_read_config_file(path)[1])",
    "journal": "from vllm_spark.tune.journal import Journal\n"
    "def read(path): path.rename(path.parent / 'journal.jsonl'); Journal(path.parent, 'device', {})",
    "weights": "from vllm_spark.executor.model_files.comparison import file_digest as read",
}


@pytest.mark.parametrize("what", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_special_file_is_one_sentence(what: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "named.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)); from pathlib import Path\n"
        f"{READERS[what]}\n"
        f"try: read(Path({str(path)!r}))\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    kind_there = {"pipe": "a named pipe", "device": "a device"}[kind]
    assert f"it is {kind_there}, and must be a regular file" in done.stdout, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 1


def test_a_file_of_the_longest_length_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    assert read_regular(path, 100) == bytes(100)
    with pytest.raises(OSError, match="it is longer than 99 bytes"):
        read_regular(path, 99)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "missing")


def test_a_file_that_becomes_a_pipe_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at its kind and the opening: the descriptor is what counts."""
    path, pipe = tmp_path / "file", tmp_path / "pipe"
    path.touch()
    os.mkfifo(pipe)
    opened = os.open
    monkeypatch.setattr(os, "open", lambda name, flags: opened(pipe, flags))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="it is a named pipe"):
        open_regular(path)
    assert len(os.listdir("/proc/self/fd")) == before
