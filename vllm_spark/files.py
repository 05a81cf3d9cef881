"""Folders of this project (package data, the user's settings, state and data), and reading and writing files.

`configs_folder`, `configuration_folder`, `state_folder` and `data_folder` are the folders; `atomic_write_text` writes a
file. A file that a user names is read with `read_regular`, or `open_regular` and `read_at_most`: a device or a pipe
could be read without end.
"""

from __future__ import annotations

import errno
import importlib.resources
import os
import stat
from pathlib import Path
from typing import BinaryIO

from vllm_spark.errors import ConfigurationError

SMALL_FILE = 64 << 10
"""Limit of a file with a few values (a secret, a launch table), in bytes."""

TABLE_FILE = 16 << 20
"""Limit of a file with many (a wire model, a configuration, a table of kernels' parameters), in bytes."""

JOURNAL_FILE = 512 << 20
"""Limit of a file that grows with use or with a model (the tuner's journal, an index of weights), in bytes."""

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is longer, or is not a regular file; `strerror` says so.
    """
    with open_regular(path) as file:
        return read_at_most(file, limit)


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading, and nothing else: opening a pipe may block, and opening a device may act.

    Raises:
        OSError: it cannot be opened, or is not a regular file; `strerror` says so.
    """
    _check_regular(path, path.stat())
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(path, os.fstat(descriptor))  # it may have been replaced
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_at_most(file: BinaryIO, limit: int) -> bytes:
    """The rest of `file`.

    Raises:
        OSError: it cannot be read, or is longer than `limit` bytes; `strerror` says so.
    """
    content = file.read(limit + 1)
    if content is None:  # some files of /proc have nothing to read yet
        raise BlockingIOError(errno.EAGAIN, "it has no content yet")
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is longer than {limit} bytes")
    return content


def _check_regular(path: Path, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "a special file")
        raise OSError(errno.EINVAL, f"it is {kind}, and must be a regular file", str(path))


def configs_folder() -> Path:
    """The folder with this package's tables and models' configurations."""
    return Path(str(importlib.resources.files("vllm_spark.configs")))


def configuration_folder() -> Path | None:
    """The folder with this user's settings; None for a user without a home folder."""
    return _folder_of_user("XDG_CONFIG_HOME", ".config")


def state_folder() -> Path | None:
    """The folder with the files that this project creates for this user; None without a home folder."""
    return _folder_of_user("XDG_STATE_HOME", ".local/state")


def data_folder() -> Path | None:
    """The folder with this user's data that is kept, such as copied models; None without a home folder."""
    return _folder_of_user("XDG_DATA_HOME", ".local/share")


def atomic_write_text(path: Path, text: str, what: str) -> None:
    """Writes a file atomically, and creates its folder.

    Args:
        path: the file.
        text: its new content.
        what: the kind of file in messages, such as `launch table`.

    Raises:
        ConfigurationError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigurationError(
            f"the {what} {path} cannot be written ({error.strerror}); give a folder in which you may write"
        ) from None


def check_writable(path: Path) -> None:
    """Raises ConfigurationError if the file `path` cannot be written: before work whose result would be lost."""
    if not os.access(path.resolve().parent, os.W_OK):
        raise ConfigurationError(f"{path} cannot be written: {path.resolve().parent} is not a writable folder")
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise ConfigurationError(f"{path} cannot be written: it is a folder, or protected; give another file")


def _folder_of_user(variable: str, below_home: str) -> Path | None:
    """According to the XDG Base Directory Specification, by which relative folders are ignored."""
    folder = Path(os.environ.get(variable, ""))
    try:
        return (folder if folder.is_absolute() else Path.home() / below_home) / "vllm-spark"
    except RuntimeError:
        return None
