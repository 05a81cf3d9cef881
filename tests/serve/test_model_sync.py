"""A model that one machine has: copied to the other over the cable, whatever happens on the way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_spark.processes.managed import POLL_SECONDS

from .hosts import Host, Hosts, two_hosts
from .process import Process, ProcessError, assert_all_gone

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
SECRET = {"VLLMSPARK_SECRET": "the secret of both machines", "PYTHONPATH": str(ROOT)}
BOUND = 60.0
SIZE = 160
"""MiB of the model: enough for two streams on two cores, each a process."""

SMALL_RANGES = ("--range-bytes", str(MIB))


@contextmanager
def slow_cable(host: Host, megabits: int) -> Iterator[None]:
    """What the host sends goes at this rate."""
    assert host.namespace is not None
    shape = ["tc", "-n", host.namespace, "qdisc"]
    rate = ["root", "tbf", "rate", f"{megabits}mbit", "burst", "256k", "latency", "50ms"]
    subprocess.run([*shape, "add", "dev", "eth0", *rate], check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run([*shape, "del", "dev", "eth0", "root"], check=True, timeout=30)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of this size in `folder`."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)], check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=30)


def model_at(folder: Path, megabytes: int, seed: int = 0) -> Path:
    """A model of eight files with bytes that repeat nowhere."""
    import numpy

    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    generator = numpy.random.default_rng(seed)
    for number in range(8):
        (folder / f"model-{number}.safetensors").write_bytes(generator.bytes(megabytes * MIB // 8))
    return folder


class Pair:
    """A leader and its follower, each on its host, that only copy; the follower has a home of its own."""

    def __init__(self, hosts: Hosts, model: Path, home: Path) -> None:
        self.hosts, self.model, self.home = hosts, model, home
        self.port = str(hosts[0].free_port())
        home.mkdir(exist_ok=True)

    def lead(self) -> Process:
        first = self.hosts[0]
        arguments = ["leader", "--address", first.address, "--port", self.port, str(self.model)]
        leader = first.popen([sys.executable, "-m", "tests.serve.copying", *arguments], SECRET, "leader", cold=True)
        leader.wait_for_line("^offers: ", BOUND)
        return leader

    def follow(self) -> Process:
        first, second = self.hosts
        own = {"HOME": str(self.home), "XDG_DATA_HOME": str(self.home / "data"), "HF_HUB_OFFLINE": "1"}
        arguments = [*SMALL_RANGES, "follower", "--leader", first.address, "--port", self.port]
        argv = [sys.executable, "-m", "tests.serve.copying", *arguments]
        return second.popen(argv, SECRET | own, "follower", cold=True)

    def arrived(self) -> int:
        """Ranges that the follower has recorded."""
        return sum(file.read_bytes().count(b"\n") for file in self.home.glob("**/*.ranges"))

    def wait_for_ranges(self, follower: Process, count: int) -> None:
        """Waits until so many MiB have arrived."""
        deadline = time.monotonic() + BOUND
        while self.arrived() < count:
            if follower.exit_code is not None or time.monotonic() > deadline:
                raise ProcessError(f"{self.arrived()} ranges of {count} have arrived")
            time.sleep(POLL_SECONDS / 10)

    def place(self, follower: Process) -> Path:
        """Where the complete model is."""
        place = Path(follower.wait_for_line("^place: (.*)$", BOUND)[1])
        assert follower.wait(BOUND) == 0
        return place

    def assert_copied(self, place: Path) -> None:
        """Nothing lost, nothing half, nothing left."""
        assert {file.name: file.read_bytes() for file in place.iterdir()} == {
            file.name: file.read_bytes() for file in self.model.iterdir()
        }
        assert [path for path in self.home.rglob("*") if "vllm-spark-copy" in path.name] == []

    def assert_not_complete(self) -> None:
        """Nothing has the name under which it would be loaded."""
        assert not list(self.home.rglob("config.json"))


@pytest.fixture(scope="module")
def cable(logs: Path) -> Iterator[Hosts]:
    """Two hosts of this module's own: nothing here imports vLLM, so none of their processes are forked."""
    with two_hosts(logs) as (hosts, reason):
        if reason is not None:
            pytest.skip(f"needs network namespaces: {reason}")
        yield hosts


@pytest.fixture
def pair(cable: Hosts, tmp_path: Path) -> Pair:
    return Pair(cable, model_at(tmp_path / "alice" / "model", SIZE), tmp_path / "bob")


@pytest.mark.parametrize("victim", [pytest.param("follower", marks=pytest.mark.thorough), "leader"])
def test_killed_at_half_and_resumed(pair: Pair, victim: str) -> None:
    """By SIGKILL, so that nobody could write anything down; a byte of what has arrived is damaged before it goes on."""
    leader = pair.lead()
    with slow_cable(pair.hosts[0], 400):
        follower = pair.follow()
        pair.wait_for_ranges(follower, SIZE // 2)
        killed, other = (follower, leader) if victim == "follower" else (leader, follower)
        os.kill(killed.pid, signal.SIGKILL)  # not its streams: they end with it
        killed.wait(BOUND)
        arrived = pair.arrived()
        pair.assert_not_complete()
        assert SIZE // 2 <= arrived < SIZE
    if victim == "leader":
        assert other.wait(BOUND) == 4
        assert "have arrived, and the copy continues with the rest" in other.output()
        assert_all_gone(other)
        leader = pair.lead()
    assert_all_gone(killed)
    complete = next(
        file for file in pair.home.glob("**/*.ranges") if file.read_bytes().count(b"\n") == SIZE // 8
    ).with_suffix(".data")
    with complete.open("r+b") as data:
        data.seek(2 * MIB)
        byte = data.read(1)
        data.seek(2 * MIB)
        data.write(bytes([byte[0] ^ 1]))
    follower = pair.follow()
    pair.assert_copied(pair.place(follower))
    sent = int(leader.wait_for_line(r"; sent: (\d+)$", BOUND)[1])
    total = sum(file.stat().st_size for file in pair.model.iterdir())
    if victim == "leader":
        kept = 2 + (arrived - 2) * MIB  # the configuration, and a MiB for each range but the damaged one
        assert sent == total - kept
    assert re.search(r"\d+\.\d MB have arrived in an earlier attempt", follower.output())
    os.kill(leader.pid, signal.SIGTERM)
    assert leader.wait(BOUND) == 0
    assert_all_gone(leader, follower)


def test_a_disk_that_gets_full_at_80_percent(pair: Pair) -> None:
    """Its room is gone while the model arrives, as if another program wrote. Once there is room, the copy goes on."""
    pair.lead()
    with small_disk(pair.home, 2 * SIZE):
        with slow_cable(pair.hosts[0], 800):
            follower = pair.follow()
            pair.wait_for_ranges(follower, SIZE // 4)
            resize(pair.home, SIZE * 8 // 10)
            assert follower.wait(BOUND) == 3
        output = follower.output()
        assert re.search(r"is full after 13\d\.\d MB of 167\.8 MB", output)
        assert "; make room there, and the copy continues" in output
        pair.assert_not_complete()
        again = pair.follow()
        assert again.wait(BOUND) == 3
        assert "the model " in again.output()
        assert "make room there, or give a folder on another disk" in again.output()
        resize(pair.home, 2 * SIZE)
        follower = pair.follow()
        pair.assert_copied(pair.place(follower))


def resize(folder: Path, megabytes: int) -> None:
    """Gives a file system of `small_disk` another size, at once."""
    command = ["mount", "-o", f"remount,size={megabytes}m", str(folder)]
    subprocess.run(command, check=True, timeout=30)


@pytest.mark.thorough
def test_ctrl_c_ends_a_copy_at_once(pair: Pair) -> None:
    leader = pair.lead()
    with slow_cable(pair.hosts[0], 20):
        follower = pair.follow()
        pair.wait_for_ranges(follower, 1)
        os.kill(leader.pid, signal.SIGINT)
        os.kill(follower.pid, signal.SIGINT)
        follower.wait(10)
    pair.assert_not_complete()
    assert_all_gone(follower)


@pytest.mark.thorough
def test_a_cable_that_is_out_for_a_while(pair: Pair) -> None:
    """TCP sends again what was lost."""
    pair.lead()
    with slow_cable(pair.hosts[0], 800):
        follower = pair.follow()
        pair.wait_for_ranges(follower, SIZE // 4)
        pair.hosts[1].unplug()
        time.sleep(3)
        pair.hosts[1].plug()
    pair.assert_copied(pair.place(follower))
