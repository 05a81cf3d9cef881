"""The proxy's thread: its name, the cores that it stays on, and its rests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .pair import connect, run_pair
from .programs import CHECKED, CSRC, SANITIZERS, Programs, without_preload

GB10 = [718] * 5 + [997] * 5 + [731] * 5 + [1017] * 4 + [1024]
"""Capacities of a DGX Spark's cores (bablick.de, "Compute nodes with heterogeneous topology in Gridware Cluster
Scheduler"): five Cortex-A725 and five Cortex-X925 in each of two clusters."""


def write_capacities(folder: Path, capacities: list[int]) -> None:
    for processor, capacity in enumerate(capacities):
        (folder / f"cpu{processor}").mkdir(parents=True)
        (folder / f"cpu{processor}" / "cpu_capacity").write_text(f"{capacity}\n")


def fast_cores(programs: Programs, folder: Path, capacities: list[int], count: int) -> list[int]:
    write_capacities(folder, capacities)
    return printed_numbers([str(programs.link("fast_cores.cpp", *CHECKED)), str(folder), str(count)])


def printed_numbers(command: list[str]) -> list[int]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=without_preload())
    return [int(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("capacities", "count", "fast"),
    [
        pytest.param(GB10, 20, [5, 6, 7, 8, 9, 15, 16, 17, 18, 19], id="GB10"),
        pytest.param(GB10, 5, [0, 1, 2, 3, 4], id="GB10, only slow ones allowed"),
        pytest.param(GB10, 7, [5, 6], id="GB10, seven allowed"),
        pytest.param([1024] * 4, 4, [0, 1, 2, 3], id="of one kind"),
        pytest.param([], 4, [0, 1, 2, 3], id="no figures"),
        pytest.param([1024, 400], 4, [0], id="figures of some"),
    ],
)
def test_the_fast_ones_of_the_allowed_processors(
    programs: Programs, tmp_path: Path, capacities: list[int], count: int, fast: list[int]
) -> None:
    assert fast_cores(programs, tmp_path / "cpu", capacities, count) == fast


BESIDE_TORCH = """
import ctypes, sys, torch
arguments = [b"fast_cores", *(argument.encode() for argument in sys.argv[2:])]
ctypes.CDLL(sys.argv[1]).main(len(arguments), (ctypes.c_char_p * len(arguments))(*arguments))
"""


def test_a_module_with_a_library_of_its_own_reads_files_beside_torch(programs: Programs, tmp_path: Path) -> None:
    """Where the compiler links the C++ library statically, its streams would mix with torch's and read nothing."""
    write_capacities(tmp_path / "cpu", GB10)
    module = programs.link("fast_cores.cpp", "-O2", "-fPIC", "-shared", "-static-libstdc++")
    command = [sys.executable, "-c", BESIDE_TORCH, str(module), str(tmp_path / "cpu"), "7"]
    assert printed_numbers(command) == [5, 6]


def test_the_runtime_has_no_streams() -> None:
    """What the test above shows of one of them holds for all, in any source (csrc/support/text_file.hpp)."""
    streams = ("<iostream>", "<fstream>", "<sstream>", "<iomanip>", "<istream>", "<ostream>", "<locale>", "<regex>")
    sources = [path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".hpp")]
    assert [path for path in sources if any(f"#include {header}" in path.read_text() for header in streams)] == []


def processors_of_threads(rank: int, exchange: Callable[[bytes], bytes]) -> dict[str, set[int]]:
    with connect(rank, exchange, loopback_mode="proxied"):
        tasks = Path("/proc/self/task").iterdir()
        return {(task / "comm").read_text().strip(): os.sched_getaffinity(int(task.name)) for task in tasks}


def test_its_name_and_its_processors() -> None:
    for outcome in run_pair(processors_of_threads):
        assert outcome.error is None
        assert outcome.value["spark-proxy"] <= os.sched_getaffinity(0)


@pytest.mark.parametrize("flags", SANITIZERS.values(), ids=SANITIZERS)
def test_a_scanner_rests_until_it_is_woken(programs: Programs, flags: tuple[str, ...]) -> None:
    program = str(programs.link("scanner_rest.cpp", *flags))
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False, env=without_preload())
    assert done.returncode == 0, f"not true: {done.stdout.splitlines()[-1:]}\n{done.stderr[-4000:]}"
    assert len(done.stdout.splitlines()) == 8
