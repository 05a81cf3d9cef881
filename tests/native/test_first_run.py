"""`vllm-spark doctor --first-run` in two processes over emulated NICs: it passes whole, and steps name faults."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.first_run_report import assert_named, assert_whole, failing_step
from vllm_spark import _native
from vllm_spark.bench.connection import open_connection
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import EXIT_LOST, EXIT_PROBLEM, EXIT_REFUSED, EXIT_USAGE
from vllm_spark.executor.channel.addresses import LOOPBACK
from vllm_spark.executor.channel.framing import Kind
from vllm_spark.processes.local import free_ports

from .emulated_nics import EmulatedNics
from .programs import without_preload

BOUND = 600.0
REPOSITORY = Path(__file__).parents[2]
SECRET = "a secret of the first run"
TWO_GPUS = Path("/dev/nvidia1").exists()
"""With two GPUs each side has its own; a single one is hidden, since two processes would take turns on it."""
OTHER_VERSION = """
import sys, vllm_spark
vllm_spark.__version__ = "9.9"
from vllm_spark.cli import main
sys.exit(main())
"""


class Machine:
    """One side of a first run."""

    def __init__(
        self,
        nics: EmulatedNics,
        folder: Path,
        name: str,
        *arguments: str,
        program: tuple[str, ...] = ("-m", "vllm_spark"),
        **environment: str,
    ) -> None:
        self.report = folder / f"{name}.json"
        self._log = folder / f"{name}.log"
        words = [*program, "doctor", "--first-run", "--wait", "300", *arguments]
        if "--report" not in arguments:
            words += ["--report", str(self.report)]
        gpu = {"CUDA_VISIBLE_DEVICES": str(int(name == "connecting")) if TWO_GPUS else ""}
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=without_preload() | nics.environment | {"VLLMSPARK_SECRET": SECRET} | gpu | environment,
                cwd=REPOSITORY,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + BOUND
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            assert self.process.poll() is None, self.output
            time.sleep(0.02)

    def ended(self, code: int) -> dict[str, Any]:
        """The report, once the process has ended with this code."""
        assert self.process.wait(BOUND) == code, self.output
        assert "Traceback" not in self.output
        assert SECRET not in self.report.read_text()
        return dict(json.loads(self.report.read_text()))


Start = Callable[..., tuple[Machine, Machine]]


@pytest.fixture
def start(nics: EmulatedNics, tmp_path: Path) -> Iterator[Start]:
    started: list[Machine] = []

    def start(*listening: str, **connecting: Any) -> tuple[Machine, Machine]:
        (port,) = free_ports(1)
        listen = ("--listen", "--address", LOOPBACK, "--port", str(port), *listening)
        started.append(Machine(nics, tmp_path, "listening", *listen))
        started.append(Machine(nics, tmp_path, "connecting", "--connect", f"{LOOPBACK}:{port}", **connecting))
        return started[0], started[1]

    yield start
    for machine in started:
        machine.process.kill()
        machine.process.wait()


@pytest.mark.thorough
def test_it_passes_whole(start: Start) -> None:
    machines = start("--collectives", "200")
    codes = [machine.process.wait(BOUND) for machine in machines]
    reports = [machine.ended(code) for machine, code in zip(machines, codes, strict=True)]
    assert_whole(reports, codes, gpus=TWO_GPUS)
    config = SparkConfig()
    packets = (16 if TWO_GPUS else 8) << 10  # the device's default
    region = _native.region_bytes(slot_bytes=config.slot_kib << 10, packet_bytes=packets, depth=config.depth)
    for report in reports:
        (figures,) = (step["figures"] for step in report["steps"] if step["name"] == "pinning")
        assert figures["region_bytes"] == region


FAULTS: dict[str, tuple[str, int, tuple[int, ...], str, str]] = {
    "memory cannot be pinned": ("refuse_pinning", 1000, (1,), "pinning", "memory could not be registered with rail 1 "),
    "a rail cannot be connected": ("refuse_connect", 1, (0,), "rail 0", "rail 0 (memory0) could not be connected"),
    "a rail is cut": ("cut", 1, (0,), "rail 0", "rail 0 (memory0) carried no write of 64 bytes"),
    "a rail loses large packets": ("lose_over", 2048, (0,), "rail 0", "carried writes of 64 bytes and none of 262144"),
    "posts are refused": ("refuse_posts", 1 << 30, (0,), "rail 0", "takes no message of 64 bytes"),
    "a write ends with an error": ("fail_next", 9, (0,), "rail 0", "rail 0 (memory0) carried no write of 64 bytes"),
    "a bit is flipped": ("flip_over", 2048, (0, 1), "packets", "has wrong bits"),
}
QUICK = {"memory cannot be pinned"}


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[] if fault in QUICK else pytest.mark.thorough) for fault in FAULTS]
)
def test_a_fault_is_named_by_its_step(nics: EmulatedNics, start: Start, fault: str) -> None:
    field, value, rails, step, seen = FAULTS[fault]
    nics.set(field, value, *rails)
    lasts = [failing_step(machine.ended(EXIT_PROBLEM)) for machine in start()]
    assert_named(lasts, step, seen)


@pytest.mark.thorough
def test_a_slow_rail_is_a_warning(nics: EmulatedNics, start: Start) -> None:
    nics.set("delay_us", 20_000, 1)
    one, other = start("--collectives", "1")
    one.wait_for("over rail 1 (memory1) takes ")
    one.process.send_signal(signal.SIGINT)
    steps = {step["name"]: step for step in one.ended(128 + signal.SIGINT)["steps"]}
    assert steps["rail 1"]["status"] == "warning"
    assert "us, more than 1000" in steps["rail 1"]["seen"]
    assert other.process.wait(BOUND) == EXIT_PROBLEM


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_is_killed_in_a_step(start: Start, rank: int) -> None:
    machines = start()
    for machine in machines:
        machine.wait_for("Small writes over rail 0")
    machines[rank].process.kill()
    last = failing_step(machines[1 - rank].ended(EXIT_LOST))
    assert (last["name"], last["status"]) == ("rail 0", "stopped")
    assert "the other machine" in last["seen"]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.thorough)])
def test_a_signal_ends_both(start: Start, number: signal.Signals) -> None:
    one, other = start()
    one.wait_for("Registering memory with rail 0")
    one.process.send_signal(number)
    report = one.ended(128 + number)
    assert report["reason"] == f"stopped by {number.name}"
    assert f"it was stopped there by {number.name}" in failing_step(other.ended(EXIT_PROBLEM))["seen"]


def test_a_signal_before_the_other_machine_has_answered(
    nics: EmulatedNics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLMSPARK_SECRET", SECRET)
    (port,) = free_ports(1)
    machine = Machine(nics, tmp_path, "listening", "--listen", "--address", LOOPBACK, "--port", str(port))
    try:
        connection = open_connection(SparkConfig(leader=LOOPBACK, port=port), BOUND, "vllm-spark x")
        connection.expect(Kind.EXCHANGE, timeout=BOUND)
        machine.process.send_signal(signal.SIGINT)
        assert machine.ended(128 + signal.SIGINT)["reason"] == "stopped by SIGINT"
        assert "stopped by SIGINT after 0 steps, and the other machine was notified" in machine.output
        connection.close()
    finally:
        machine.process.kill()
        machine.process.wait()


def test_a_report_that_can_no_longer_be_written(nics: EmulatedNics, tmp_path: Path) -> None:
    """The output does not claim that it exists."""
    (port,) = free_ports(1)
    folder = tmp_path / "reports"
    folder.mkdir()
    report = ("--report", str(folder / "report.json"))
    machine = Machine(nics, tmp_path, "one", "--listen", "--address", LOOPBACK, "--port", str(port), *report)
    try:
        machine.wait_for("Waiting for the other machine")
        folder.rmdir()
        folder.write_text("")
        machine.process.send_signal(signal.SIGINT)
        assert machine.process.wait(BOUND) == EXIT_USAGE
        assert "report.json cannot be written" in machine.output
        assert "The report is in" not in machine.output
    finally:
        machine.process.kill()
        machine.process.wait()


def test_another_secret(start: Start) -> None:
    one, other = start(VLLMSPARK_SECRET="another secret of a stranger")
    failed = check_refusal(one, other, EXIT_USAGE, "another secret")
    assert "secret" in failed["seen"]


@pytest.mark.thorough
def test_another_version(start: Start) -> None:
    one, other = start(program=("-c", OTHER_VERSION))
    failed = check_refusal(one, other, EXIT_REFUSED, "9.9")
    assert "install the same version on both" in failed["seen"]


def check_refusal(one: Machine, other: Machine, code: int, reason: str) -> dict[str, Any]:
    """Both name the reason, and the one that listens goes on to wait; returns the failed step of the other."""
    (failed,) = other.ended(code)["steps"]
    assert (failed["name"], failed["status"]) == ("connection", "failed")
    one.wait_for(reason)
    one.process.send_signal(signal.SIGINT)
    assert one.ended(128 + signal.SIGINT)["reason"] == "stopped by SIGINT"
    return dict(failed)


def test_a_report_that_cannot_be_written(nics: EmulatedNics, tmp_path: Path) -> None:
    machine = Machine(nics, tmp_path, "one", "--listen", "--report", str(tmp_path / "no folder" / "report.json"))
    assert machine.process.wait(BOUND) == EXIT_USAGE
    assert "is not a writable folder" in machine.output
