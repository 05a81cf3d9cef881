"""The native code under sanitizers, and on aarch64 as far as an emulator goes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BINDINGS = ROOT / "csrc" / "bindings.cpp"
SOURCES = [str(path) for path in sorted((ROOT / "csrc").rglob("*.cpp")) if path != BINDINGS] + [
    str(Path(__file__).with_name("stress.cpp"))
]
FLAGS = ["-std=c++17", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror"]


def build(compiler: str, target: Path, *flags: str) -> None:
    done = subprocess.run(
        [compiler, *FLAGS, *flags, *SOURCES, "-o", str(target)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


def run(*command: str) -> None:
    # vLLM's CPU build preloads libraries into what a process starts, and AddressSanitizer must be the first.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
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


CROSS_COMPILER = "aarch64-linux-gnu-g++"


def test_the_bindings_compile_for_aarch64() -> None:
    """Against this machine's Python headers and torch's copy of pybind11, which hold for any 64-bit Linux."""
    if shutil.which(CROSS_COMPILER) is None:
        pytest.skip("needs g++-aarch64-linux-gnu (Debian package)")
    headers = [sysconfig.get_path("include"), str(Path(torch.__file__).with_name("include"))]
    done = subprocess.run(
        [CROSS_COMPILER, *FLAGS, "-fsyntax-only", *(f"-isystem{folder}" for folder in headers), str(BINDINGS)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_two_ranks_on_aarch64(tmp_path: Path) -> None:
    """Shows that it compiles and computes right there; the emulator's memory order is the host's."""
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if shutil.which(CROSS_COMPILER) is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user (Debian packages)")
    build(CROSS_COMPILER, tmp_path / "stress", "-static")
    run(emulator, str(tmp_path / "stress"), "300")
