"""A Debian kernel with its modules, in the cache folder: unpacked, never installed.

<cache>/kernels/<version>/boot/vmlinuz-<version>
<cache>/kernels/<version>/lib/modules/<version>/
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import CannotRun
from .packages import apt, run_tool

META_PACKAGES = ("linux-image-6.12-amd64", "linux-image-amd64")
"""Packages that depend on a release's current kernel, the preferred one first: the older Debian's own is 6.1."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel; `root` looks like the root of a system that has only this package."""

    version: str
    root: Path

    @property
    def image(self) -> Path:
        return self.root / "boot" / f"vmlinuz-{self.version}"

    @property
    def modules(self) -> Path:
        return self.root / "lib" / "modules" / self.version


def cache_folder() -> Path:
    """Where everything is kept that is made once and used again; outside of the repository."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm-spark" / "rdma-lab"


def kernel() -> Kernel:
    """The newest kernel in the cache; if there is none, Debian's current one is fetched (110 MB).

    Raises:
        CannotRun: it can not be had.
    """
    folder = cache_folder() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotRun(f"the cache folder {folder} cannot be made: {error.strerror}; set XDG_CACHE_HOME") from error
    with _one_at_a_time(folder):
        kept = [Kernel(entry.name, entry) for entry in folder.iterdir() if entry.is_dir() and entry.name[0].isdigit()]
        return max(kept, key=_age) if kept else _fetch(folder)


def _age(kernel: Kernel) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", kernel.version)]


def _fetch(folder: Path) -> Kernel:
    for leftover in folder.glob("unfinished-*"):  # of a session that was killed
        shutil.rmtree(leftover)
    package = _current_package()
    version = package.removeprefix("linux-image-")
    with tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-") as name:
        work = Path(name)
        apt("download", "-qq", package, cwd=work)
        (archive,) = work.glob("*.deb")
        fetched = Kernel(version, work / "root")
        run_tool(["dpkg", "-x", str(archive), str(fetched.root)])
        run_tool(["depmod", "-b", str(fetched.root), version])
        if not fetched.image.exists():
            raise CannotRun(f"the package {package} has no {fetched.image.name}; try another Debian release")
        return Kernel(version, Path(shutil.move(fetched.root, folder / version)))


def _current_package() -> str:
    for update in (False, True):
        if update and os.geteuid() == 0:
            apt("update", "-qq")  # a fresh image knows no packages at all
        for meta in META_PACKAGES:
            depends = run_tool(["apt-cache", "depends", meta]) if _known(meta) else ""
            if found := re.search(r"Depends: (linux-image-\d\S+)", depends):
                return found[1]
    raise CannotRun(f"apt knows no kernel: none of {', '.join(META_PACKAGES)}; run `apt-get update` as root")


def _known(package: str) -> bool:
    return package in run_tool(["apt-cache", "pkgnames", package]).split()


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keeps sessions that start together from fetching the same thing."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
