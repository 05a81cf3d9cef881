"""The native code under sanitizers, and on aarch64 as far as an emulator goes."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from .programs import BINDINGS, FLAGS, SANITIZERS, Programs, compile_with, need, without_preload

CROSS_COMPILER = "aarch64-linux-gnu-g++"


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=without_preload())
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.stdout.strip().endswith("ok")


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_two_ranks_under_a_sanitizer(sanitizer: str, programs: Programs) -> None:
    run(programs.link("stress.cpp", *SANITIZERS[sanitizer]), "1500")


def test_the_bindings_compile_for_aarch64() -> None:
    """Against this machine's Python headers and torch's copy of pybind11, which hold for any 64-bit Linux."""
    need(CROSS_COMPILER, "g++-aarch64-linux-gnu")
    headers = [sysconfig.get_path("include"), str(Path(torch.__file__).with_name("include"))]
    compile_with(CROSS_COMPILER, *FLAGS, "-O1", "-fsyntax-only", *(f"-isystem{folder}" for folder in headers), BINDINGS)


@pytest.mark.thorough
def test_two_ranks_on_aarch64(programs: Programs) -> None:
    """Shows that it compiles and computes right there; the emulator's memory order is the host's."""
    need(CROSS_COMPILER, "g++-aarch64-linux-gnu")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("needs qemu-aarch64 (Debian package qemu-user)")
    run(emulator, programs.link("stress.cpp", "-O1", "-static", compiler=CROSS_COMPILER), "300")
