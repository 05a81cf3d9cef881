"""Where memory can run out: in the machine, and in each cgroup of this process that has a lower limit.

`read_scopes` reads them, and `container_memory` the memory of this machine or container. A scope's `reserve_of` is what
a start leaves there, and its `floor` what the guard keeps free.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import psutil

from vllm_spark.memory.cgroups import memory_cgroups

GIB = 1 << 30

MACHINE = "this machine"

_LARGEST_FLOOR = GIB
_FLOOR_SHARE = 8  # a floor is an eighth of a small scope, and of a large reserve
_PRESSURE_FILE = Path("/proc/pressure/memory")
_PRESSURE = re.compile(r"^full avg10=([\d.]+)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Scope:
    """One limit of memory, in bytes.

    Attributes:
        name: `this machine`, or `the cgroup /NAME`.
        total: the limit.
        available: what can still be allocated, file cache that the kernel can drop included.
        pressure: percent of the last ten seconds in which all its programs waited for memory; None if not known.
    """

    name: str
    total: int
    available: int
    pressure: float | None = None

    def floor(self, reserve: int) -> int:
        """Bytes below which the guard stops an engine: a GiB, less in a small scope, more with a large reserve.

        Args:
            reserve: what the settings keep free on the machine, in bytes.
        """
        floor = min(_LARGEST_FLOOR, self.total // _FLOOR_SHARE)
        return max(floor, reserve // _FLOOR_SHARE) if self.name == MACHINE else floor

    def reserve_of(self, reserve: int) -> int:
        """Bytes that a start must leave: the reserve on the machine, elsewhere or without one the guard's floor.

        Args:
            reserve: what the settings keep free on the machine, in bytes.
        """
        return max(reserve if self.name == MACHINE else 0, self.floor(reserve))


def read_scopes() -> list[Scope]:
    """The machine, and every cgroup of this process whose limit is lower than the machine's memory."""
    memory = psutil.virtual_memory()
    scopes = [Scope(MACHINE, memory.total, memory.available, _pressure(_PRESSURE_FILE))]
    for group in memory_cgroups():
        limit, available = group.limit(), group.available()
        if limit is not None and available is not None and limit < memory.total:
            scopes.append(Scope(f"the cgroup {group.name}", limit, available, _pressure(group.pressure_file)))
    return scopes


def container_memory() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    limits = [group.limit() for group in memory_cgroups() if group.outermost]
    return min([psutil.virtual_memory().total, *(limit for limit in limits if limit is not None)])


def gib(count: float) -> str:
    """`1.5` for that many GiB; small amounts have more digits."""
    value = count / GIB
    return f"{value:.1f}" if value >= 0.95 or value == 0 else f"{value:.2f}"


def _pressure(path: Path | None) -> float | None:
    try:
        found = _PRESSURE.search(path.read_text()) if path is not None else None
    except OSError:  # a kernel without it, or one that has it turned off
        return None
    return float(found[1]) if found else None
