"""The verbs transport under sanitizers, over a libibverbs in this process whose connections break again and again.

What is on its way when a connection breaks may still arrive, as on a wire. Real queue pairs are in tests/rdma.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = [
    str(path)
    for path in sorted((HERE.parents[1] / "csrc").rglob("*.cpp"))
    if path.name != "bindings.cpp" and path.parent.name != "device"
]
OPERATIONS = 1000
POSTS_BETWEEN_BREAKS = 25  # on average


def compile_with(*arguments: str) -> None:
    command = ["g++", "-std=c++17", "-g", "-pthread", "-Wall", "-Wextra", "-Werror", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the libibverbs that fails. No sanitizer: what it writes, a NIC writes."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("unreliable")
    compile_with("-O2", "-shared", "-fPIC", str(HERE / "verbs_unreliable.cpp"), "-o", str(folder / "libibverbs.so.1"))
    return folder


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("thread", ["-fsanitize=thread"]),
        ("address and undefined", ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]),
    ],
)
def test_rails_that_break_under_a_sanitizer(name: str, flags: list[str], library: Path, tmp_path: Path) -> None:
    program = tmp_path / "link_stress"
    compile_with("-O1", *flags, *SOURCES, str(HERE / "link_stress.cpp"), "-ldl", "-o", str(program))
    done = subprocess.run(
        [str(program), str(OPERATIONS)],
        env={
            "LD_LIBRARY_PATH": str(library),
            "BREAK_EVERY": str(POSTS_BETWEEN_BREAKS),
            # That library's own memory is behind a lock which the sanitizer does not see.
            "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    figures = re.search(r"(\d+) connections broken, \d+ failures, (\d+) recoveries", done.stdout)
    assert figures is not None, done.stdout
    assert int(figures[1]) > 10
    assert int(figures[2]) > 10
    assert done.stdout.endswith("ok\n")
