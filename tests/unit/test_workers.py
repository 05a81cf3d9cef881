"""How tests are shared out among the workers of a run, and what comes back from them. The runs are real ones."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distribution import rank_of, unit_of

from .test_channel import wait_for

ROOT = Path(__file__).parents[2]
BOUND = 120.0
CLOSING_LINE = re.compile(r"=+ .*\d+ (passed|failed).* =+")
"""As `.ci/run` looks for it."""


def start(folder: Path, **tests: str) -> subprocess.Popen[str]:
    """Starts pytest with two workers and the hooks of tests/conftest.py; `tests` are files, name -> content."""
    for name, content in tests.items():
        (folder / f"{name}.py").write_text(content)
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-n", "2", "--rootdir", str(folder), str(folder)],
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A run in the background has inherited that it ignores this signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def output_of(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=BOUND)[0]
    finally:
        process.kill()


def test_what_takes_long_is_one_unit_and_begins_first() -> None:
    nodeids = [
        "tests/models/test_a.py::test_x",
        "tests/native/test_a.py::test_x[tests/serve/]",
        "tests/rdma/test_a.py::test_x",
        "tests/rdma/test_b.py::test_x",
        "tests/serve/test_a.py::test_x",
        "tests/unit/test_a.py::test_x",
        "tests/unit/test_a.py::test_y[a::b]",
    ]
    units = list(dict.fromkeys(unit_of(nodeid) for nodeid in sorted(nodeids, key=rank_of)))
    assert units == [
        "tests/serve/",
        "tests/rdma/",
        "tests/models/",
        "tests/native/test_a.py",
        "tests/unit/test_a.py",
    ]


FILE = """
import os, pytest
from tests import notices

@pytest.mark.parametrize("number", range(10))
def test_it(number, pytestconfig):
    notices.add(pytestconfig, "NOTICE OF {name}", "said by " + os.environ["PYTEST_XDIST_WORKER"])
    with open("{name}.workers", "a") as file:
        print(os.environ["PYTEST_XDIST_WORKER"], file=file)
"""


def test_a_file_stays_in_one_worker_and_its_notice_is_shown(tmp_path: Path) -> None:
    names = ("test_a", "test_b", "test_c")
    process = start(tmp_path, **{name: FILE.replace("{name}", name) for name in names})
    output = output_of(process)
    assert process.returncode == 0, output
    used = {name: set((tmp_path / f"{name}.workers").read_text().split()) for name in names}
    assert all(len(workers) == 1 for workers in used.values()), used
    assert used["test_a"] != used["test_b"], "the first two begin at the same time"
    for name, (worker,) in used.items():
        assert re.search(rf"^-+ NOTICE OF {name} -+$\nsaid by {worker}$", output.replace("=", "-"), re.MULTILINE), (
            output
        )
    assert CLOSING_LINE.fullmatch(output.splitlines()[-1]), output


LONG = """
import pathlib, time, pytest

@pytest.fixture
def resource():
    yield
    time.sleep(1)
    pathlib.Path("released").touch()

def test_it(resource):  # interrupted only now: pytest tears down what has been set up
    pathlib.Path("begun").touch()
    time.sleep(1000)
"""


def test_an_interrupt_releases_what_tests_hold(tmp_path: Path) -> None:
    """A terminal sends it to every process of the run."""
    process = start(tmp_path, test_long=LONG)
    try:
        wait_for((tmp_path / "begun").exists, "the test has begun", BOUND)
        os.killpg(process.pid, signal.SIGINT)
        output = output_of(process)
    finally:
        process.kill()
    assert process.returncode == pytest.ExitCode.INTERRUPTED, output
    assert (tmp_path / "released").exists(), output
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
