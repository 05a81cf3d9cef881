"""Memory: cgroups of both versions, the sum that refuses a start, the guard's decision, and the page cache."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.page_cache import cached
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import SparkError
from vllm_spark.memory import guard
from vllm_spark.memory.cgroups import memory_cgroups
from vllm_spark.memory.guard import MemoryGuard, decide
from vllm_spark.memory.need import MemoryNeed, refusal
from vllm_spark.memory.page_cache import PageCacheEviction
from vllm_spark.memory.scopes import GIB, MACHINE, Scope, container_memory, gib, read_scopes

MIB = 1 << 20
V1_MOUNT = "30 25 0:26 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V2_MOUNT = "31 25 0:27 {root} /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"


def machine_with(root: Path, own: str, mounts: str, files: dict[str, str]) -> Path:
    """A copy of a machine's files about cgroups."""
    contents = {"proc/self/cgroup": own, "proc/self/mountinfo": mounts, **files}
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def v2_files(folder: str, limit: str, usage: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    statistics = f"anon 1\ninactive_file {inactive}\nactive_file {active}\n"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": str(usage), f"{folder}/memory.stat": statistics}


def test_cgroups_of_version_2_up_to_the_root(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/user.slice"
    root = machine_with(
        tmp_path,
        "0::/user.slice/session.scope\n",
        V2_MOUNT.format(root="/"),
        v2_files(base, str(8 * GIB), 6 * GIB, inactive=GIB, active=GIB)
        | v2_files(f"{base}/session.scope", "max", 5 * GIB),
    )
    session, user = memory_cgroups(root)
    assert (session.name, session.limit(), session.available()) == ("/user.slice/session.scope", None, None)
    assert (user.name, user.limit(), user.available()) == ("/user.slice", 8 * GIB, 3.5 * GIB)
    assert user.pressure_file == tmp_path / base / "memory.pressure"
    assert [each.outermost for each in (session, user)] == [False, False], "the root of version 2 has no limit"


def test_a_container_with_a_name_space_of_its_own(tmp_path: Path) -> None:
    root = machine_with(tmp_path, "0::/\n", V2_MOUNT.format(root="/"), v2_files("sys/fs/cgroup", str(4 * GIB), 5 * GIB))
    (group,) = memory_cgroups(root)
    assert (group.name, group.available(), group.outermost) == ("/", 0, True)


def test_a_container_of_version_1(tmp_path: Path) -> None:
    """Its own cgroup is what is mounted. The hierarchy of version 2 beside it controls no memory."""
    folder = "sys/fs/cgroup/memory"
    files = {
        f"{folder}/memory.limit_in_bytes": str(4 * GIB),
        f"{folder}/memory.usage_in_bytes": str(3 * GIB),
        f"{folder}/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB}\ntotal_active_file 0\n",
    }
    own = "4:cpu,cpuacct:/docker/a\n3:memory:/docker/a\n0::/docker/a\n"
    mounts = V1_MOUNT.format(root="/docker/a") + "\n" + V2_MOUNT.format(root="/docker/a")
    (group,) = memory_cgroups(machine_with(tmp_path, own, mounts, files))
    assert (group.name, group.limit(), group.available()) == ("/docker/a", 4 * GIB, 2 * GIB)
    assert (group.outermost, group.pressure_file) == (True, None)


def test_a_cgroup_inside_of_a_container(tmp_path: Path) -> None:
    """Outside it is below the container's, whose name is no folder inside."""
    root = machine_with(
        tmp_path,
        "0::/docker/a/inner\n",
        V2_MOUNT.format(root="/docker/a"),
        v2_files("sys/fs/cgroup", str(4 * GIB), GIB) | v2_files("sys/fs/cgroup/inner", str(2 * GIB), GIB),
    )
    found = [(group.name, group.available(), group.outermost) for group in memory_cgroups(root)]
    assert found == [("/docker/a/inner", GIB, False), ("/docker/a", 3 * GIB, True)]


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    assert memory_cgroups(tmp_path) == []


def test_this_machine_has_memory() -> None:
    machine, *groups = read_scopes()
    assert machine.name == MACHINE
    assert 0 < machine.available < machine.total
    assert all(group.total < machine.total for group in groups)
    assert 0 < container_memory() <= machine.total


DESK = Scope(MACHINE, 120 * GIB, 110 * GIB)
SMALL = Scope("the cgroup /small", 4 * GIB, 3 * GIB)
RESERVE = 8 * GIB
NEED = MemoryNeed(weights=15 * GIB, graphs=2 * GIB, region=GIB // 16, utilization=0.92)


def refused(need: MemoryNeed, *scopes: Scope, reserve: int = RESERVE) -> str | None:
    return refusal(need, scopes, 120 * GIB, reserve, "desk1", "--spark-reserve-memory")


def test_the_sum_of_what_vllm_takes_by_its_share() -> None:
    assert refused(NEED, DESK) == (
        "the start does not fit into the memory of desk1: 118.5 GiB (weights 15.0, KV cache 93.4 as the rest of 0.92 x "
        "120.0, graphs and activations 2.0, region 0.06, desktop 8.0 by --spark-reserve-memory) are more than the "
        "110.0 of 120.0 GiB that are available in this machine; give --gpu-memory-utilization 0.84 or less, or end "
        "other programs on desk1"
    )
    assert refused(replace(NEED, utilization=0.84), DESK) is None, "the remedy is one"
    assert refused(replace(NEED, utilization=0.85), DESK) is not None


def test_the_sum_with_a_kv_cache_of_a_given_size() -> None:
    sentence = refused(replace(NEED, kv_cache=100 * GIB), DESK)
    assert sentence is not None
    assert "KV cache 100.0, graphs" in sentence
    most = 110 * GIB - RESERVE - NEED.weights - NEED.graphs - NEED.region
    assert sentence.endswith(f"; give a KV cache of at most {most} bytes (--kv-cache-memory-bytes)")
    assert refused(replace(NEED, kv_cache=most), DESK) is None
    assert refused(replace(NEED, kv_cache=most + 1), DESK) is not None


def test_a_model_for_which_no_setting_is_enough() -> None:
    for need in (replace(NEED, weights=101 * GIB), replace(NEED, weights=101 * GIB, kv_cache=GIB)):
        sentence = refused(need, DESK)
        assert sentence is not None
        assert "; end other programs on desk1, or serve a smaller model" in sentence


def test_the_reserve_is_of_the_machine_and_a_cgroup_keeps_what_the_guard_defends() -> None:
    need = MemoryNeed(weights=2 * GIB, kv_cache=0)
    assert refused(need, DESK, SMALL) is None
    sentence = refused(replace(need, weights=3 * GIB), DESK, SMALL)
    assert sentence is not None
    assert "kept free 0.50) are more than the 3.0 of 4.0 GiB that are available in the cgroup /small" in sentence
    both = refused(replace(need, weights=130 * GIB), DESK, SMALL)
    assert "in the cgroup /small" in str(both), "where less is left, though neither has enough"
    assert refused(need, replace(DESK, available=3 * GIB), reserve=0) is None
    assert "kept free 1.0" in str(refused(need, replace(DESK, available=3 * GIB - 1), reserve=0))


@pytest.mark.parametrize(
    ("scope", "reserve", "action", "reason"),
    [
        (DESK, RESERVE, "none", ""),
        (replace(DESK, available=2 * GIB), RESERVE, "none", ""),
        (replace(DESK, available=2 * GIB - 1), RESERVE, "warn", "the engine is stopped below 1.0 GiB"),
        (replace(DESK, available=GIB - 1), RESERVE, "stop", "and the guard keeps 1.0 GiB free"),
        (replace(DESK, available=GIB - 1), 0, "stop", "and the guard keeps 1.0 GiB free"),
        (replace(DESK, available=3 * GIB), 32 * GIB, "stop", "and the guard keeps 4.0 GiB free"),
        (replace(DESK, available=7 * GIB, pressure=19.9), RESERVE, "none", ""),
        (
            replace(DESK, available=7 * GIB, pressure=20.0),
            RESERVE,
            "stop",
            "waited for memory in 20 % of the last 10 s",
        ),
        (replace(DESK, pressure=90.0), RESERVE, "none", ""),  # of programs in a cgroup of their own
        (SMALL, RESERVE, "none", ""),
        (replace(SMALL, available=700 * MIB), RESERVE, "warn", "0.68 of 4.0 GiB are available in the cgroup /small"),
        (replace(SMALL, available=500 * MIB), RESERVE, "stop", "0.49 of 4.0 GiB are available in the cgroup /small"),
    ],
)
def test_the_decision(scope: Scope, reserve: int, action: str, reason: str) -> None:
    decided = decide(scope, reserve)
    assert decided.action == action
    assert reason in decided.reason


def test_the_guard_warns_once_and_stops_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The amounts are chosen, since a test must not exhaust the machine's memory (tests/serve does so in a cgroup)."""
    amounts = [100 * GIB, 2 * GIB - 1, 2 * GIB - 2, 5 * GIB, 2 * GIB - 3, GIB - 1]
    monkeypatch.setattr(guard, "_LONGEST", 0.01)
    monkeypatch.setattr(guard, "_SHORTEST", 0.01)
    monkeypatch.setattr(guard, "read_scopes", lambda: [replace(DESK, available=amounts.pop(0))])
    reasons: list[SparkError] = []
    watching = MemoryGuard(RESERVE, "desk1", reasons.append)
    watching.start()
    watching.join(20)
    assert not amounts
    assert [str(reason).partition(";")[0] for reason in reasons] == [
        "the memory of desk1 runs out: 1.0 of 120.0 GiB are available in this machine, and the guard keeps 1.0 GiB free"
    ]
    assert sum("Memory runs short" in message for message in caplog.messages) == 2


def test_a_guard_that_is_stopped_ends() -> None:
    watching = MemoryGuard(0, "desk1", lambda error: None)
    watching.start()
    watching.stop()
    watching.join(20)
    assert not watching.is_alive()


def test_the_reserve_depends_on_the_kind_of_memory() -> None:
    assert SparkConfig().reserved_bytes(unified=True) == 8 * GIB
    assert SparkConfig().reserved_bytes(unified=False) == 0
    assert SparkConfig(reserve_memory=1.5).reserved_bytes(unified=True) == 1.5 * GIB
    assert SparkConfig(reserve_memory=0).reserved_bytes(unified=True) == 0


@pytest.mark.parametrize(("count", "text"), [(0, "0.0"), (GIB // 100, "0.01"), (GIB, "1.0"), (93.44 * GIB, "93.4")])
def test_gib(count: float, text: str) -> None:
    assert gib(count) == text


class ObservedEviction(PageCacheEviction):
    """Sets `seen` once it has seen a file mapped."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.seen = threading.Event()
        super().__init__(files)

    def _mapped(self) -> set[str]:
        found = super()._mapped()
        if found:
            self.seen.set()
        return found


def test_a_file_is_evicted_once_it_is_unmapped_and_all_at_the_end(tmp_path: Path) -> None:
    first, second, linked = (tmp_path / name for name in ("first", "second", "linked"))
    for file in (first, second):
        with file.open("wb") as output:
            output.write(b"x" * (8 * MIB))
            os.fsync(output.fileno())
        file.read_bytes()
    linked.symlink_to(first)
    assert cached([first, second]) == 16 * MIB
    with ObservedEviction([linked, second]) as eviction:
        with first.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert mapped[:: mmap.PAGESIZE].count(b"x") == 8 * MIB // mmap.PAGESIZE
            assert eviction.seen.wait(20)
        deadline = time.monotonic() + 20
        while cached([first]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert cached([first]) == 0
        assert cached([second]) == 8 * MIB, "it was never mapped here"
    assert cached([second]) == 0
