"""The model of the link (csrc/transport/wire_model.cpp), without a link and without a clock."""

from __future__ import annotations

import subprocess

from .programs import CHECKED, Programs, without_preload


def test_single_writes_rates_and_order_of_random_traffic(programs: Programs) -> None:
    """On random figures; the program prints the first property that is wrong."""
    program = programs.link("wire_model.cpp", *CHECKED)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, env=without_preload())
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 100_000
