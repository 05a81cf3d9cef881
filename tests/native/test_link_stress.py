"""The verbs transport under sanitizers, over a libibverbs in this process that fails again and again.

Its connections break, and it refuses posts. What is on its way then may still arrive, as on a wire. Real queue pairs
are in tests/rdma.
"""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from .programs import SANITIZERS, Programs

OPERATIONS = 1000
POSTS_BETWEEN_BREAKS = 25  # on average
POSTS_BETWEEN_REFUSALS = 100  # on average


@pytest.fixture(scope="module")
def runs(programs: Programs) -> dict[str, subprocess.CompletedProcess[str]]:
    """Both programs, run at the same time: nearly all of the minute that one takes, it waits."""

    def run(sanitizer: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(programs.link("link_stress.cpp", *SANITIZERS[sanitizer])), str(OPERATIONS)],
            env={
                "LD_LIBRARY_PATH": str(programs.libibverbs("verbs_unreliable.cpp")),
                "BREAK_EVERY": str(POSTS_BETWEEN_BREAKS),
                "REFUSE_EVERY": str(POSTS_BETWEEN_REFUSALS),
                # That library's own memory is behind a lock which the sanitizer does not see.
                "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    with ThreadPoolExecutor(len(SANITIZERS)) as pool:
        return dict(zip(SANITIZERS, pool.map(run, SANITIZERS), strict=True))


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_rails_that_break_under_a_sanitizer(sanitizer: str, runs: dict[str, subprocess.CompletedProcess[str]]) -> None:
    done = runs[sanitizer]
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    figures = re.search(r"(\d+) connections broken, (\d+) posts refused, \d+ failures, (\d+) recoveries", done.stdout)
    assert figures is not None, done.stdout
    assert all(int(figure) > 10 for figure in figures.groups()), done.stdout
    assert done.stdout.endswith("ok\n")
