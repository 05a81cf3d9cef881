"""The memory cgroups of this process, of version 1 or 2, from the kernel's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

_FILES: dict[int, tuple[str, str, str, str]] = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"),
    2: ("memory.max", "memory.current", "inactive_file", "active_file"),
}
"""By version: the files of the limit and of the usage, and two entries of `memory.stat`."""


class _Mount(NamedTuple):
    version: Literal[1, 2]
    root: str
    """The cgroup that is visible at `folder`."""
    folder: Path


@dataclasses.dataclass(frozen=True)
class Cgroup:
    """A memory cgroup that this process belongs to.

    Attributes:
        name: its path in the hierarchy, such as `/system.slice`.
        folder: where its files are.
        version: of the hierarchy.
        outermost: whether nothing above it is visible: in a container it is the container's.
    """

    name: str
    folder: Path
    version: Literal[1, 2]
    outermost: bool

    def limit(self) -> int | None:
        """Its limit in bytes; None if it has none, or it cannot be read."""
        return _number(self.folder / _FILES[self.version][0])

    def available(self) -> int | None:
        """Bytes that its processes can still allocate; None without a limit.

        Of its file cache the inactive part counts as available and half of the active one, as in MemAvailable, because
        programs run from the rest.
        """
        limit, usage = self.limit(), _number(self.folder / _FILES[self.version][1])
        if limit is None or usage is None:
            return None
        inactive, active = (self._statistic(name) for name in _FILES[self.version][2:])
        return min(limit, max(0, limit - usage + inactive + active // 2))

    @property
    def pressure_file(self) -> Path | None:
        """Its pressure stall information, which only version 2 has."""
        return self.folder / "memory.pressure" if self.version == 2 else None

    def _statistic(self, name: str) -> int:
        for line in _lines(self.folder / "memory.stat"):
            key, _, value = line.partition(" ")
            if key == name and value.isdecimal():
                return int(value)
        return 0


def memory_cgroups(root: Path = Path("/")) -> list[Cgroup]:
    """The memory cgroups of this process with those above it, as far as they are mounted here; innermost first.

    Args:
        root: `/`, or a folder with a copy of another machine's files.
    """
    own = dict(_own(root))
    found: list[Cgroup] = []
    for mount in _mounts(root):
        path = own.get(mount.version)
        if path is None:
            continue
        # A container sees its own cgroup at the mount's root, under the name that it has outside or as `/`.
        visible = PurePosixPath(path)
        below = visible.relative_to(mount.root if visible.is_relative_to(mount.root) else "/")
        folders = [mount.folder / below, *(mount.folder / below).parents]
        for folder in folders:
            if (folder / _FILES[mount.version][1]).exists():
                name = f"{mount.root.rstrip('/')}/{folder.relative_to(mount.folder).as_posix().strip('.')}"
                found.append(Cgroup(name.rstrip("/") or "/", folder, mount.version, folder == mount.folder))
            if folder == mount.folder:
                break
    return found


def _own(root: Path) -> Iterator[tuple[int, str]]:
    """This process's path in each hierarchy that controls memory, by version."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            yield 1, path
        elif not controllers:
            yield 2, path


def _mounts(root: Path) -> Iterator[_Mount]:
    """Where hierarchies that control memory are mounted."""
    seen: set[tuple[int, str]] = set()
    for line in _lines(root / "proc/self/mountinfo"):
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.partition(" ")
        words = fields.split()
        if len(words) < 5 or kind not in ("cgroup", "cgroup2"):
            continue
        if kind == "cgroup" and "memory" not in options.rpartition(" ")[2].split(","):
            continue
        version: Literal[1, 2] = 2 if kind == "cgroup2" else 1
        if (version, words[3]) not in seen:
            seen.add((version, words[3]))
            yield _Mount(version, words[3], root / words[4].lstrip("/"))


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)[:1]).strip()
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
