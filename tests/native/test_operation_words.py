"""How an error names an operation, also one of a tag that no rank of this version sends."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .programs import FLAGS, HERE, compile_with, need

TAGS = {
    0x4800_0008: "an all_reduce of 8 float32",
    0x8000_0064: "an all_gather of 100 bytes",
    0x0000_0000: "an unknown collective of 0 bytes",
    0xE000_0001: "an unknown collective of 1 unknown elements",
}


def test_an_operation_reads_as_a_part_of_a_sentence(tmp_path: Path) -> None:
    need("g++", "g++")
    compile_with("g++", *FLAGS, HERE / "operation_words.cpp", "-o", tmp_path / "words")
    done = subprocess.run([tmp_path / "words", *map(str, TAGS)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == list(TAGS.values())
