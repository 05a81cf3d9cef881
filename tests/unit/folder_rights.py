"""A folder that nobody may enter, also not root, who runs tests in containers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_VERSION = 0x20080522  # of Linux's struct for capabilities
_PASS_RIGHTS_BY = (1 << 1) | (1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def no_entry(folder: Path) -> Iterator[None]:
    """Takes all rights of `folder` away while inside, and from this thread what passes rights by."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, given = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, given) == 0
    fewer = (ctypes.c_uint32 * 6)(*given)
    fewer[0] &= ~_PASS_RIGHTS_BY  # effective; what is permitted stays, to be taken back
    mode = folder.stat().st_mode
    folder.chmod(0)
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, given) == 0
        folder.chmod(mode)
