"""Shared memory that outlives its owners: files in /dev/shm, and mappings of the ranks' regions, which are nameless.

Each host has a /dev/shm of its own, so what other programs of this machine do there is not seen. Where hosts are only
loopback addresses, they share the machine's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vllm_spark.processes.managed import POLL_SECONDS, Process

from .hosts import Host

REGION = "vllm-spark-region"
"""What a rank's memory is called in /proc/PID/maps: it is a memfd, with no name in any folder."""

Listing = set[Path]


def listing(*hosts: Host) -> Listing:
    """Everything in the hosts' /dev/shm."""
    return {path for host in hosts for path in host.shared_memory.iterdir()}


def left_since(before: Listing, *hosts: Host) -> list[str]:
    """What is new in the hosts' /dev/shm and mapped by no living process."""
    new = {path: inode for path in listing(*hosts) - before if (inode := _inode(path))}
    if not new:
        return []
    mapped: set[str] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            # By device and inode: a semaphore is mapped before it gets its name.
            mapped.update(" ".join(line.split()[3:5]) for line in _maps(int(entry.name)).splitlines())
    return sorted(str(path) for path, inode in new.items() if inode not in mapped)


def holders(*processes: Process) -> list[int]:
    """Those of the processes and of what they started that map a rank's memory or have it open, by process id."""
    pids = {pid for process in processes for pid in (process.pid, *(child.pid for child in process.descendants()))}
    return sorted(pid for pid in pids if REGION in _maps(pid) or any(REGION in name for name in _open_files(pid)))


def assert_as_before(before: Listing, *survivors: Process, hosts: Sequence[Host], timeout: float = 10.0) -> None:
    """Fails the test if, `timeout` seconds from now, more is left in /dev/shm, or a survivor holds a region.

    Args:
        before: what `listing(*hosts)` returned before the test.
        survivors: processes that go on, and those that they started.
        hosts: where to look.
        timeout: seconds.
    """
    deadline = time.monotonic() + timeout
    while (left := (left_since(before, *hosts), holders(*survivors))) != ([], []) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    assert left == ([], []), f"left in /dev/shm: {left[0]}; held by processes {left[1]}"


def _inode(path: Path) -> str:
    """Device and inode, as /proc/PID/maps has them; empty for a file that is gone."""
    with suppress(FileNotFoundError):
        found = path.stat()
        return f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x} {found.st_ino}"
    return ""


def _maps(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/maps").read_text()
    return ""


def _open_files(pid: int) -> list[str]:
    """What a process has open, as the links of /proc/PID/fd name it."""
    found = []
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.append(str(entry.readlink()))
    return found
