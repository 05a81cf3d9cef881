"""A folder for the sockets between vLLM's processes, which vLLM leaves in /tmp when it is killed.

The process that reads the settings creates it and removes it at exit. If that process is killed, its engine removes
the folder; if both are killed, the next pair of this user does.
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

from vllm_spark.errors import ConfigurationError

logger = logging.getLogger("vllm_spark")

VARIABLE = "VLLM_RPC_BASE_PATH"
"""The variable with the folder of vLLM's sockets; a user's value is kept."""

PREFIX = "vllm-spark-sockets-"
_own: list[tuple[int, Path]] = []  # the folder that this process created, with the process's id
_OWNER = "owner"  # a file that the owner keeps locked while it runs
_GRACE_SECONDS = 60.0  # seconds in which a new folder may lack its owner's file
_MAX_PATH_BYTES = 107 - len("/01234567-89ab-cdef-0123-456789abcdef")
"""Bytes of a folder's path: a socket's address holds 107, and vLLM names each by a UUID."""


def check_socket_folder() -> None:
    """Checks that vLLM's sockets can be created, before anything starts.

    Raises:
        ConfigurationError: the path of the folder for them is too long.
    """
    folder = os.environ.get(VARIABLE) or tempfile.gettempdir()
    if (length := len(os.fsencode(folder))) > _MAX_PATH_BYTES:
        name = VARIABLE if os.environ.get(VARIABLE) else "TMPDIR"
        raise ConfigurationError(
            f"the folder for vLLM's sockets, {folder}, has a path of {length} bytes, and a socket's allows "
            f"{_MAX_PATH_BYTES}; set {name} to a shorter one, such as /tmp"
        )


def make_socket_folder() -> None:
    """Creates a folder for the sockets of this process and its children, to be removed at exit.

    Does nothing if the variable is set and not empty, or, with a warning, if a socket's path would be too long there.
    Removes the folders of this user's killed processes.
    """
    if os.environ.get(VARIABLE):
        return
    parent = Path(tempfile.gettempdir())
    _remove_abandoned(parent)
    folder = _make_owned(parent)
    if folder is not None:
        os.environ[VARIABLE] = str(folder)
        _own.append((os.getpid(), folder))
        atexit.register(remove_own_socket_folder)


def remove_own_socket_folder() -> None:
    """Removes the folder that this process created, if any; may be called again.

    Does nothing in a process that the owner forked.
    """
    for owner, folder in _own:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)


def remove_socket_folder() -> None:
    """Removes the folder in the variable, if this module created it: its owner has ended."""
    folder = Path(os.environ.get(VARIABLE, ""))
    if folder.name.startswith(PREFIX):
        shutil.rmtree(folder, ignore_errors=True)


def _make_owned(parent: Path) -> Path | None:
    """A new folder, owned by this process; None, with a warning, if it cannot be created."""
    try:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            if len(os.fsencode(folder)) > _MAX_PATH_BYTES:
                folder.rmdir()
                logger.warning(
                    "vLLM's sockets are in no separate folder and remain after a kill: the path %s is longer than %d "
                    "bytes, too long for sockets in it; set TMPDIR to a shorter one.",
                    folder,
                    _MAX_PATH_BYTES,
                )
                return None
            if _lock(folder, os.O_CREAT) is not None:
                return folder  # else another process removed it as abandoned before it was locked
    except OSError as error:
        logger.warning("vLLM's sockets are in no separate folder and remain after a kill: %s.", error)
        return None


def _lock(folder: Path, flags: int = 0) -> int | None:
    """The locked descriptor of the folder, to be left open; None if another process owns it, or it was removed."""
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
    """Removes this user's folders that no running process owns."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            descriptor = _lock(folder)
            if descriptor is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)
            elif time.time() - found.st_mtime > _GRACE_SECONDS:
                folder.rmdir()  # empty: its owner ended before it locked it
