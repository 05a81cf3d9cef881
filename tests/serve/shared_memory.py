"""Shared memory that outlives its owners: files in /dev/shm, and mappings of the ranks' regions, which are nameless."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from vllm_spark.processes.managed import POLL_SECONDS, Process

SHARED = Path("/dev/shm")
REGION = "vllm-spark-region"
"""What a rank's memory is called in /proc/PID/maps: it is a memfd, with no name in any folder."""


def listing() -> set[str]:
    """Everything in /dev/shm."""
    return {path.name for path in SHARED.iterdir()}


def left_since(before: set[str]) -> list[str]:
    """What is new in /dev/shm and mapped by no living process: other programs of this machine use the folder too."""
    new = {name: inode for name in listing() - before if (inode := _inode(name))}
    if not new:
        return []
    mapped: set[str] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            # By inode: a semaphore is mapped before it gets its name.
            mapped.update(line.split()[4] for line in _maps(int(entry.name)).splitlines() if f" {SHARED}/" in line)
    return sorted(name for name, inode in new.items() if inode not in mapped)


def holders(*processes: Process) -> list[int]:
    """Those of the processes and of what they started that map a rank's memory or have it open, by process id."""
    pids = {pid for process in processes for pid in (process.pid, *(child.pid for child in process.descendants()))}
    return sorted(pid for pid in pids if REGION in _maps(pid) or any(REGION in name for name in _open_files(pid)))


def assert_as_before(before: set[str], *survivors: Process, timeout: float = 10.0) -> None:
    """Fails the test if, `timeout` seconds from now, something is left in /dev/shm, or a survivor holds a region."""
    deadline = time.monotonic() + timeout
    while (left := (left_since(before), holders(*survivors))) != ([], []) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    assert left == ([], []), f"left in /dev/shm: {left[0]}; held by processes {left[1]}"


def _inode(name: str) -> str:
    with suppress(FileNotFoundError):
        return str((SHARED / name).stat().st_ino)
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
