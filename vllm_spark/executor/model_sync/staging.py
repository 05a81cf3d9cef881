"""The folder in which files lie until they are complete: what has arrived is known after a kill of either side.

For each file there are `KEY.data`, with its bytes at their places, and `KEY.ranges`, with a line for each range that
has arrived and the checksum of its bytes. KEY comes from the file's name and digest, so another version of the file is
another pair of files, and nothing that lies here is ever taken for a complete file. One process at a time has the lock.
The folder is removed when the copy is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from vllm_spark.errors import RefusedError
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.model_sync.manifest import CopiedFile
from vllm_spark.executor.model_sync.remedies import Remedies, follower_remedies
from vllm_spark.files import JOURNAL_FILE, read_regular

RANGE_BYTES = 32 << 20
"""Bytes that are asked for, checked and recorded at once; the last range of a file is shorter."""

TREE = "tree"
"""The folder of the staging folder in which a new folder is made before it is renamed."""

_LOCK = "lock"
_ZEROS = bytes(16)


class Range(NamedTuple):
    """A piece of a file, in bytes."""

    offset: int
    length: int


def ranges_of(size: int) -> list[Range]:
    """The ranges of a file, in order; one that is empty for an empty file."""
    return [Range(offset, min(RANGE_BYTES, size - offset)) for offset in range(0, size, RANGE_BYTES)] or [Range(0, 0)]


class Checksum:
    """A checksum of 128 bits that costs little (GMAC with a known key): it finds damage, not forgery.

    TLS authenticates what arrives; this finds what a disk or a crash has changed between two attempts.
    """

    def __init__(self) -> None:
        self._state = Cipher(algorithms.AES(_ZEROS), modes.GCM(_ZEROS[:12])).encryptor()

    def update(self, data: memoryview) -> None:
        """Adds bytes."""
        self._state.authenticate_additional_data(data)

    def hex(self) -> str:
        """The checksum of all bytes; the last call."""
        self._state.finalize()
        return self._state.tag.hex()


def open_data(path: Path) -> int:
    """Opens a file of the staging folder for reading and writing; made if it is not there, and never through a link.

    Raises:
        OSError: it cannot be opened.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def checksum_at(descriptor: int, piece: Range, buffer: memoryview) -> str | None:
    """The checksum of a range of a file; None if the file is shorter.

    Raises:
        OSError: it cannot be read.
    """
    checksum, at, end = Checksum(), piece.offset, piece.offset + piece.length
    while at < end:
        count = os.preadv(descriptor, [buffer[: min(len(buffer), end - at)]], at)
        if count == 0:
            return None
        checksum.update(buffer[:count])
        at += count
    return checksum.hex()


class Staging:
    """The staging folder of one destination. A context manager; leaving it keeps what has arrived.

    Args:
        folder: made if it is not there.
        remedies: what a user can do about an error; by default a follower's.

    Raises:
        RefusedError: it cannot be made, is a symbolic link, or another process copies into it.
    """

    def __init__(self, folder: Path, remedies: Remedies | None = None) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not stat.S_ISDIR(folder.lstat().st_mode):
                raise RefusedError(f"{folder} on {host_name()} is a symbolic link and must be a folder; remove it")
            self.lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RefusedError(
                f"{folder} on {host_name()} cannot be made ({error.strerror}), and files are kept there while they are "
                f"copied; let this user write there, or {(remedies or follower_remedies()).folder}"
            ) from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.lock)
            raise RefusedError(
                f"another process on {host_name()} copies files into {folder} now; wait for it, or end it"
            ) from None

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.lock)

    def data(self, file: CopiedFile) -> Path:
        """Where the bytes of a file are."""
        return self.folder / f"{_key(file)}.data"

    def arrived(self, file: CopiedFile) -> dict[int, str]:
        """The checksums of the ranges of a file that have arrived, by their offsets; to be compared with the bytes."""
        try:
            lines = read_regular(self._ranges(file), JOURNAL_FILE).decode("ascii", "replace").splitlines(keepends=True)
        except OSError:
            return {}
        found: dict[int, str] = {}
        for line in lines:
            offset, _, checksum = line.partition(" ")
            # The last line of a killed process may be incomplete.
            if offset.isdecimal() and line.endswith("\n") and len(checksum) == 33:
                found[int(offset)] = checksum.strip()
        return {piece.offset: found[piece.offset] for piece in ranges_of(file.size) if piece.offset in found}

    def record(self, file: CopiedFile, offset: int, checksum: str) -> None:
        """Records that a range has arrived. Raises OSError."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._ranges(file), flags, 0o666)
        try:
            os.write(descriptor, f"{offset} {checksum}\n".encode())
        finally:
            os.close(descriptor)

    def forget(self, file: CopiedFile) -> None:
        """Deletes what has arrived of a file."""
        for path in (self._ranges(file), self.data(file)):
            path.unlink(missing_ok=True)

    def allocated(self, file: CopiedFile) -> int:
        """Bytes of the disk that its data takes now."""
        try:
            return min(self.data(file).lstat().st_blocks * 512, file.size)
        except OSError:
            return 0

    def forget_others(self, files: list[CopiedFile]) -> None:
        """Deletes what is left of files that are not among these: other versions."""
        wanted = {_key(file) for file in files}
        for path in self.folder.iterdir():
            if path.suffix in (".data", ".ranges") and path.stem not in wanted:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Deletes the folder, once everything in it is where it belongs."""
        self.forget_others([])
        self.remove_tree()
        (self.folder / _LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    @property
    def tree(self) -> Path:
        """Where a new folder is made."""
        return self.folder / TREE

    def remove_tree(self) -> None:
        """Deletes it. Raises OSError."""
        if os.path.lexists(self.tree):
            shutil.rmtree(self.tree)

    def is_linked(self, file: CopiedFile) -> bool:
        """Whether the data of a file is also a file elsewhere."""
        try:
            return self.data(file).lstat().st_nlink > 1
        except OSError:
            return False

    def _ranges(self, file: CopiedFile) -> Path:
        return self.folder / f"{_key(file)}.ranges"


def is_full(error: OSError) -> bool:
    """Whether a disk or a quota is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _key(file: CopiedFile) -> str:
    return hashlib.blake2b(f"{file.digest} {file.name}".encode(), digest_size=16).hexdigest()
