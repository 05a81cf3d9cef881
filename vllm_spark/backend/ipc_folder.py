"""A folder of its own for the sockets between vLLM's processes, which vLLM leaves in /tmp whenever it is killed.

The process that reads the settings makes it and removes it at its end. If that process is killed, its engine removes
the folder; if both are, the next pair of this user does.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

logger = logging.getLogger("vllm_spark")

VARIABLE = "VLLM_RPC_BASE_PATH"
"""Where vLLM makes its sockets; whoever sets it decides."""

PREFIX = "vllm-spark-sockets-"
_OWNER = "owner"  # a file that its owner has locked for as long as it lives
_NEWBORN = 60.0  # seconds in which a folder may be without its owner's file
_LONGEST = 107 - len("/01234567-89ab-cdef-0123-456789abcdef")
"""Bytes of a folder's path: a socket's address holds 107, and vLLM names each by a UUID."""


def make_socket_folder() -> None:
    """Sends vLLM's sockets of this process, and of those that it starts, to a folder that goes away with it.

    Does nothing if the variable is set, or, as the log says then, if a socket's path would be too long there. Removes
    what killed processes of this user have left.
    """
    if VARIABLE in os.environ:
        return
    parent = Path(tempfile.gettempdir())
    _remove_abandoned(parent)
    folder = _make_owned(parent)
    if folder is not None:
        os.environ[VARIABLE] = str(folder)
        atexit.register(_remove_own, os.getpid(), folder)


def remove_socket_folder() -> None:
    """Removes the folder that the variable names, if it is one of these: its owner is dead."""
    folder = Path(os.environ.get(VARIABLE, ""))
    if folder.name.startswith(PREFIX):
        shutil.rmtree(folder, ignore_errors=True)


def _make_owned(parent: Path) -> Path | None:
    """A new folder whose owner is this process; None where there can be none, which the log says."""
    try:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            if len(os.fsencode(folder)) > _LONGEST:
                folder.rmdir()
                logger.warning(
                    "vLLM's sockets have no folder of their own, and stay behind after a kill: the path of %s is "
                    "longer than %d bytes, with which a socket's is too long; set TMPDIR to a shorter one.",
                    folder,
                    _LONGEST,
                )
                return None
            if _lock(folder, os.O_CREAT) is not None:
                return folder  # else one that cleans up took it for abandoned, in the moment before it was locked
    except OSError as error:
        logger.warning("vLLM's sockets have no folder of their own, and stay behind after a kill: %s.", error)
        return None


def _lock(folder: Path, flags: int = 0) -> int | None:
    """The descriptor that owns the folder, to be left open; None if another process owns it, or it is gone."""
    try:
        descriptor = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    except FileNotFoundError:
        return None
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return descriptor
    os.close(descriptor)
    return None


def _remove_abandoned(parent: Path) -> None:
    """Removes this user's folders that no living process owns."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            descriptor = _lock(folder)
            if descriptor is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)
            elif time.time() - found.st_mtime > _NEWBORN:
                folder.rmdir()  # an empty one has lost its owner before that could lock it


def _remove_own(owner: int, folder: Path) -> None:
    """At the owner's end; not at that of a process that it forked."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
