"""The verbs transport between two processes, over NICs that are emulated: faults of rails under random collectives.

The program of both ranks is that of tests/rdma, where real queue pairs carry the same.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rdma.exercise import longest_wait
from vllm_spark.collective import CollectiveError, Runtime, RuntimeOptions
from vllm_spark.processes.local import free_ports

from .emulated_nics import EmulatedNics
from .pair import Pipe, values
from .programs import without_preload

BOUND = 120.0
REPOSITORY = Path(__file__).parents[2]
OPERATIONS = 2000


class Ranks:
    """Two processes of tests/rdma/exercise.py on this machine."""

    def __init__(self, nics: EmulatedNics, folder: Path, port: int, *arguments: str, **options: Any) -> None:
        words = ["--host", "127.0.0.1", "--port", str(port), "--options", json.dumps(options), *arguments]
        self.logs = [folder / f"rank{rank}.log" for rank in (0, 1)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            command = [sys.executable, "-m", "tests.rdma.exercise", str(rank), *words]
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=without_preload() | nics.environment,
                    cwd=REPOSITORY,
                )
            self.processes.append(process)

    def wait_for(self, pattern: str) -> None:
        """Waits until both have printed a line like that."""
        deadline = time.monotonic() + BOUND
        while not all(re.search(pattern, log.read_text(), re.MULTILINE) for log in self.logs):
            assert time.monotonic() < deadline, [log.read_text()[-2000:] for log in self.logs]
            time.sleep(0.05)

    def carry_on(self, operations: int) -> None:
        """Waits until both have done that many more, a multiple of 100."""
        done = [int(re.findall(r"^done (\d+)$", log.read_text(), re.MULTILINE)[-1]) for log in self.logs]
        self.wait_for(f"^done {max(done) + operations}$")

    def finish(self) -> list[dict[str, Any]]:
        """Both reports; each rank must have found every bit right and the same."""
        reports = self.ended(0)
        assert reports[0]["digest"] == reports[1]["digest"]
        return reports

    def ended(self, code: int) -> list[dict[str, Any]]:
        """Both reports of ranks that end with this code."""
        reports = []
        for process, log in zip(self.processes, self.logs, strict=True):
            assert process.wait(BOUND) == code, log.read_text()[-4000:]
            reports.append(dict(json.loads(log.read_text().splitlines()[-1])))
        return reports

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def start(nics: EmulatedNics, tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    started = []

    def start(*arguments: str, **options: Any) -> Ranks:
        (port,) = free_ports(1)
        started.append(Ranks(nics, tmp_path, port, *arguments, **options))
        return started[-1]

    yield start
    for ranks in started:
        ranks.end()


def test_both_rails_carry(nics: EmulatedNics, start: Callable[..., Ranks]) -> None:
    for report in start("--operations", str(OPERATIONS)).finish():
        assert report["counters"]["rail_failures"] == 0
        posts = report["counters"]["rail_posts"][:2]
        assert min(posts) > 0.3 * sum(posts)
    assert min(nics.packets(0), nics.packets(1)) > 0


FAULTS: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "a rail is out": ("cut", 1, (1,)),
    "both rails are out": ("cut", 1, (0, 1)),
    "a port is down": ("port_down", 1, (1,)),
    "a rail loses large packets": ("lose_over", 2048, (0,)),
    "a rail is late": ("delay_us", 20_000, (0,)),
    "posts are refused": ("refuse_posts", 3, (0, 1)),
    "a write ends with an error": ("fail_next", 9, (0,)),
}


RAIL_SECONDS = 0.5
QUICK_TIMES = {"link_timeout_s": 30.0, "rail_timeout_s": RAIL_SECONDS}
SHARE_SECONDS = 0.3
"""What an operation may take besides the time-out of a rail: an announcement, of which there are five a second, lets
the NIC wait anew; then the failure is found, and the messages are sent again."""
STAYS_OUT = {"cut", "port_down", "lose_over"}
QUICK = {"both rails are out", "a rail loses large packets"}


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[] if fault in QUICK else pytest.mark.thorough) for fault in FAULTS]
)
def test_no_message_is_lost_or_wrong(nics: EmulatedNics, start: Callable[..., Ranks], fault: str) -> None:
    """The fault comes amid operations and goes after two seconds; both go on until the rails work again.

    While one rail is out the other one carries on, and no operation waits longer than for the time-out of the first.
    """
    field, value, rails = FAULTS[fault]
    late, one_fails = field == "delay_us", len(rails) == 1
    ranks = start("--operations", "300", "--seconds", "4", "--recoveries", "0" if late else "1", **QUICK_TIMES)
    ranks.wait_for("^done 200$")
    with nics.fault(field, value, *rails):
        if field in STAYS_OUT and one_fails:
            ranks.carry_on(200)
        else:
            time.sleep(2)
    reports = ranks.finish()
    for report in reports:
        counters = report["counters"]
        assert counters["rail_failures"] == counters["rail_recoveries"]
        assert (counters["rail_failures"] == 0) == late
    if one_fails and not late:
        assert longest_wait(reports) <= RAIL_SECONDS + SHARE_SECONDS


def drop(rank: int, exchange: Pipe, folder: Path, library: Path) -> str:
    """Rank 0 drops its runtime while rank 1 waits for it."""
    EmulatedNics(folder, library).use_in_this_process()
    runtime = Runtime.connect(rank, 2, exchange, RuntimeOptions("verbs", timeout_s=BOUND), announce=lambda _: None)
    if rank == 1:
        try:
            runtime.all_reduce(torch.ones(8))
        except CollectiveError as error:
            return str(error)
    del runtime
    gc.collect()
    return ", ".join(thread.name for thread in threading.enumerate())


def test_a_runtime_that_is_dropped_is_closed(nics: EmulatedNics) -> None:
    """Its thread ends, and the peer gets the reason, without a call of `close`."""
    threads, error = values(drop, nics.folder, nics.library)
    assert "spark-link" not in threads
    assert error == "rank 0 stopped: it closed its runtime"


@pytest.mark.thorough
def test_a_link_that_stays_out_is_named(nics: EmulatedNics, start: Callable[..., Ranks]) -> None:
    ranks = start("--operations", "1000000", link_timeout_s=2.0, rail_timeout_s=0.5)
    ranks.wait_for("^done 200$")
    nics.set("cut", 1)
    errors = [report["error"] for report in ranks.ended(3)]
    assert any("transport retry counter exceeded (status 12, vendor error 0x81" in error for error in errors)
    assert any("no rail came back within 2.0 s" in error for error in errors), errors


@pytest.mark.thorough
def test_a_device_that_hangs_is_given_up(nics: EmulatedNics, start: Callable[..., Ranks]) -> None:
    """It completes nothing, and reports no failure; the other rail carries on after ten seconds."""
    ranks = start("--operations", "300", "--seconds", "15", **QUICK_TIMES)
    ranks.wait_for("^done 200$")
    nics.set("hang", 1, 0)
    reports = ranks.finish()
    for report, log in zip(reports, ranks.logs, strict=True):
        assert report["counters"]["rail_failures"] == 1
        reasons = r"the device completed nothing within 1\d|its other end failed"
        assert re.search(rf"Rail 0 .* failed: ({reasons})", log.read_text())
    # On the other rank it may be the question whether both are done.
    assert 9 < max(report["longest"] for report in reports) < 20


@pytest.mark.thorough
def test_a_rail_that_cannot_be_connected(nics: EmulatedNics, start: Callable[..., Ranks]) -> None:
    nics.set("refuse_connect", 1, 0)
    for report in start("--operations", "500").finish():
        posts = report["counters"]["rail_posts"][:2]
        assert posts[0] == 0
        assert posts[1] > 0
