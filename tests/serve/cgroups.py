"""Real memory cgroups of this machine, of whichever version it has, for programs of a host."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vllm_spark.memory.cgroups import Cgroup, memory_cgroups

_ENTER = {
    1: "mount -t tmpfs none /sys/fs/cgroup && mkdir /sys/fs/cgroup/memory && "
    "mount -t cgroup -o memory none /sys/fs/cgroup/memory",
    2: "mount -t cgroup2 none /sys/fs/cgroup",
}
"""Shell commands that mount the hierarchy again: `ip netns exec` gives a program a /sys without it."""


class CannotMakeCgroups(Exception):
    """Memory cgroups cannot be made on this machine; the message has the reason."""


@dataclass(frozen=True)
class MemoryCgroup:
    """A cgroup with a limit of its own."""

    cgroup: Cgroup

    def command(self, argv: Sequence[str]) -> list[str]:
        """A command that runs `argv` in it."""
        folder = str(self.cgroup.folder)
        script = f'[ -e "$0" ] || {{ {_ENTER[self.cgroup.version]}; }} && echo $$ > "$0"/cgroup.procs && exec "$@"'
        return ["sh", "-c", script, folder, *argv]

    def oom_kills(self) -> int:
        """How often the kernel's OOM killer has killed a program in it."""
        name = "memory.oom_control" if self.cgroup.version == 1 else "memory.events"
        values = dict(line.split() for line in (self.cgroup.folder / name).read_text().splitlines())
        return int(values["oom_kill"])


@contextmanager
def memory_cgroup(limit: int) -> Iterator[MemoryCgroup]:
    """Makes a cgroup of `limit` bytes below this process's own, and removes it afterwards.

    Raises:
        CannotMakeCgroups: it cannot be made.
    """
    own = memory_cgroups()
    if not own:
        raise CannotMakeCgroups("no hierarchy of cgroups that controls memory is mounted")
    parent = own[0]
    folder = parent.folder / f"vsp{os.getpid()}"
    made = Cgroup(f"{parent.name.rstrip('/')}/{folder.name}", folder, parent.version, False)
    try:
        if made.version == 2:
            (parent.folder / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
    except OSError as error:
        raise CannotMakeCgroups(f"{folder} cannot be made ({error.strerror}); run as root") from None
    try:
        (folder / ("memory.limit_in_bytes" if made.version == 1 else "memory.max")).write_text(str(limit))
        yield MemoryCgroup(made)
    finally:
        folder.rmdir()
