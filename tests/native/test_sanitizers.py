"""The native code under sanitizers, and on aarch64 as far as an emulator goes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [str(path) for path in sorted((ROOT / "csrc").rglob("*.cpp")) if path.name != "bindings.cpp"] + [
    str(Path(__file__).with_name("stress.cpp"))
]
FLAGS = ["-std=c++17", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror"]


def build(compiler: str, target: Path, *flags: str) -> None:
    done = subprocess.run(
        [compiler, *FLAGS, *flags, *SOURCES, "-o", str(target)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.stdout.strip().endswith("ok")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("thread", ["-fsanitize=thread"]),
        ("address and undefined", ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]),
    ],
)
def test_two_ranks_under_a_sanitizer(name: str, flags: list[str], tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    build("g++", tmp_path / "stress", *flags)
    run(str(tmp_path / "stress"), "1500")


def test_two_ranks_on_aarch64(tmp_path: Path) -> None:
    """Shows that it compiles and computes right there; the emulator's memory order is the host's."""
    compiler, emulator = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if shutil.which(compiler) is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user (Debian packages)")
    build(compiler, tmp_path / "stress", "-static")
    run(emulator, str(tmp_path / "stress"), "300")
