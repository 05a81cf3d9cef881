"""How a collective on a GPU is cut into messages and blocks (csrc/gpu/launch_plan.cpp), without a GPU."""

from __future__ import annotations

import subprocess

from .programs import Programs, need


def test_every_byte_is_in_one_piece_and_both_ranks_cut_alike(programs: Programs) -> None:
    """Of many random shapes and regions, with sizes at their bounds; the program prints the first wrong one."""
    need("g++", "g++")
    program = programs.link("launch_plan.cpp", "-O2")
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    packets, payloads = map(int, done.stdout.split())
    assert packets > 10_000
    assert payloads > 10_000
