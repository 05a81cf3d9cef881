"""Evicts weight files from the kernel's page cache while they are loaded.

On unified memory a file that was read occupies the memory of the GPU a second time until the kernel reclaims it. A file
is evicted once this process has unmapped it, as vLLM's loader does after each, and all files once loading has ended:
those that a loader reads without mapping them, too.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from typing_extensions import Self

_INTERVAL = 0.25  # seconds between two readings of what is mapped
_END_SECONDS = 10.0  # for the end of the thread, which may wait for a disk
_MAPS = Path("/proc/self/maps")


class PageCacheEviction:
    """Evicts `files` within its context, from a thread of its own.

    Args:
        files: that are loaded; symbolic links are followed.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = {os.path.realpath(file) for file in files}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="spark-page-cache", daemon=True)

    def __enter__(self) -> Self:
        if self._files:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._files:
            self._thread.join(_END_SECONDS)
        for file in sorted(self._files):
            evict(file)

    def _follow(self) -> None:
        """Evicts each file once it is not mapped any more, until the context ends."""
        mapped: set[str] = set()
        while not self._ended.wait(_INTERVAL):
            now = self._mapped()
            for file in mapped - now:
                evict(file)
            mapped = now

    def _mapped(self) -> set[str]:
        """Those of the files that this process has mapped now."""
        try:
            lines = _MAPS.read_text(errors="replace").splitlines()
        except OSError:
            return set()
        return {path for line in lines if (path := line[line.find("/") :] if "/" in line else "") in self._files}


def evict(file: str) -> None:
    """Removes the pages of a file that no process has mapped, and that are not to be written, from the page cache."""
    with contextlib.suppress(OSError):  # it was removed, or is on a file system without a page cache
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
