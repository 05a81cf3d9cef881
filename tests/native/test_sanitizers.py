"""The native code under sanitizers, and on aarch64 as far as an emulator goes."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from .programs import BINDINGS, CSRC, FLAGS, SANITIZERS, Programs, compile_with, need, without_preload

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


FENCED = (
    *("proxy/slot_scanner.cpp", "cpu/cpu_rank.cpp", "gpu/gpu_rank.cpp", "gpu/machine_probe.cpp"),
    *("transport/link/announcements.cpp", "transport/packet_copy.cpp", "transport/modelled/nic.cpp"),
    "transport/wire_probe.cpp",
)
"""Sources in which a CPU loads what a device has stored."""


@pytest.mark.parametrize("source", FENCED)
def test_loads_of_what_a_device_has_stored_are_fenced_on_aarch64(source: str, tmp_path: Path) -> None:
    """By a barrier for the outer shareable domain, and never by one for the inner, which leaves devices out."""
    need(CROSS_COMPILER, "g++-aarch64-linux-gnu")
    assembly = tmp_path / "assembly.s"
    compile_with(CROSS_COMPILER, *FLAGS, "-O3", "-S", CSRC / source, "-o", assembly)
    text, calls = assembly.read_text(), (CSRC / source).read_text().count("from_device(")
    assert text.count("dmb\toshld") + text.count("dmb oshld") >= calls > 0
    assert "dmb\tishld" not in text


@pytest.mark.thorough
def test_two_ranks_on_aarch64(programs: Programs) -> None:
    """Shows that it compiles and computes right there; the emulator's memory order is the host's."""
    need(CROSS_COMPILER, "g++-aarch64-linux-gnu")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("needs qemu-aarch64 (Debian package qemu-user)")
    run(emulator, programs.link("stress.cpp", "-O1", "-static", compiler=CROSS_COMPILER), "300")
