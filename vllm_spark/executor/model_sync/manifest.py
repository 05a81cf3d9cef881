"""The list of files that are copied: made where they are, and checked where they go.

The receiver trusts no name of the list: `check_manifest` accepts relative names alone that cannot lead out of a folder,
and `file_below` none whose way leads through a symbolic link.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from fnmatch import fnmatchcase
from pathlib import Path

from vllm_spark.errors import RefusedError
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.model_files.comparison import file_digest
from vllm_spark.executor.model_files.hub_cache import HubPlace, refs_to
from vllm_spark.executor.model_files.loaded import BESIDE_WEIGHTS, LoadedFiles
from vllm_spark.executor.model_files.own import single_name
from vllm_spark.executor.model_files.weights import is_content
from vllm_spark.files import open_regular

_MOST_FILES = 20_000
_MOST_FOLDERS = 4  # in a name
_LARGEST_BESIDE = 16 << 20  # bytes of a file that is not compared
_LONGEST_PART = 200  # bytes of a file's or folder's name: file systems take 255
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


@dataclasses.dataclass(frozen=True)
class CopiedFile:
    """One file.

    Attributes:
        name: relative to the folder, with "/" between its parts.
        size: in bytes.
        digest: `file_digest` of it.
        blob: its name in `blobs/` of a hub's cache; empty if it is not in one.
    """

    name: str
    size: int
    digest: str
    blob: str = ""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All files of a model, a tokenizer or an adapter that are copied.

    Attributes:
        files: each once.
        refs: names of branches and tags that mean this commit in the sender's cache of the hub.
    """

    files: list[CopiedFile]
    refs: list[str] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


@dataclasses.dataclass(frozen=True)
class FileState:
    """A file of the sender's as it was listed. A change of any of it is a change of the file.

    Attributes:
        path: where it is.
        inode, size, changed_ns: what its content is known by.
        compared: False for a small file beside those that are compared, which may change, as a log does.
    """

    path: Path
    inode: int
    size: int
    changed_ns: int
    compared: bool = True

    @classmethod
    def of(cls, path: Path, compared: bool = True) -> FileState:
        """The file at `path` now. Raises OSError."""
        found = path.stat()
        return cls(path, found.st_ino, found.st_size, found.st_mtime_ns, compared)

    def is_unchanged(self) -> bool:
        """Whether the file is still as it was listed."""
        try:
            return FileState.of(self.path, self.compared) == self
        except OSError:
            return False


def list_files(wanted: LoadedFiles) -> tuple[Manifest, list[FileState]]:
    """What is copied of `wanted`, which is on this machine: what is compared, and small files beside it.

    One of those that changes while it is read is left out.

    Raises:
        RefusedError: a file cannot be read, or was changed since it was compared.
    """
    place = Path(wanted.place)
    compared = wanted.identity.digests
    alone = single_name(wanted) is not None
    folder = place.parent if alone else place
    names = [*compared, *([] if alone else _beside(folder, compared))]
    files, states = [], []
    for name in names:
        path = folder / name
        try:
            with open_regular(path):
                state = FileState.of(path, name in compared)
        except OSError as error:
            if name not in compared:
                continue
            raise RefusedError(f"{path} cannot be read ({error.strerror}); it was there when it was compared") from None
        try:
            digest = file_digest(path)
        except RefusedError:
            if name in compared:
                raise
            continue
        if not (state.compared or state.is_unchanged()):
            continue
        if digest != compared.get(name, digest):
            raise RefusedError(changed(path))
        files.append(CopiedFile(name, state.size, digest, _blob(path)))
        states.append(state)
    refs = [] if wanted.hub is None else refs_to(place, wanted.hub)
    # The receiver refuses a list with others, and the copy is complete without a branch.
    return Manifest(files, [ref for ref in refs if _REF.fullmatch(ref)]), states


def changed(path: Path) -> str:
    """The sentence about a file of this machine that is not what it was."""
    return f"{path} on {host_name()} was changed after it was compared; start again once it is complete"


def check_manifest(manifest: Manifest, wanted: LoadedFiles) -> None:
    """Checks a list that the other machine sent.

    Raises:
        RefusedError: a name that may lead out of the model's folder, or cannot be a file's; a file twice; an impossible
            size or digest; too many files; or a file that must be in it is not.
    """
    if len(manifest.files) > _MOST_FILES:
        raise RefusedError(_invalid(wanted, f"{len(manifest.files)} files, more than {_MOST_FILES}"))
    seen: set[str] = set()
    for file in manifest.files:
        if (problem := _name_problem(file.name)) is not None:
            raise RefusedError(_invalid(wanted, f"a file named {file.name[:200]!r}, {problem}"))
        if file.name in seen:
            raise RefusedError(_invalid(wanted, f"the file {file.name!r} twice"))
        if file.size < 0:
            raise RefusedError(_invalid(wanted, f"a file of {file.size} bytes, {file.name!r}"))
        if not _DIGEST.fullmatch(file.digest) or not (file.blob == "" or _BLOB.fullmatch(file.blob)):
            raise RefusedError(_invalid(wanted, f"a digest of {file.name!r} that is not one"))
        seen.add(file.name)
    for name in seen:
        for folder in Path(name).parents:
            if str(folder) in seen:
                raise RefusedError(_invalid(wanted, f"{str(folder)!r} both as a file and as a folder"))
    for ref in manifest.refs:
        if not _REF.fullmatch(ref):
            raise RefusedError(_invalid(wanted, f"a branch named {ref[:200]!r}"))
    digests = {file.name: file.digest for file in manifest.files}
    for name, digest in wanted.identity.digests.items():
        if digests.get(name) != digest:
            raise RefusedError(_invalid(wanted, f"no file {name!r} with the content that was compared"))


def is_hub_place(hub: HubPlace) -> bool:
    """Whether all parts of another machine's `hub` are valid, so that they can name folders of a cache."""
    return (
        bool(_REPOSITORY.fullmatch(hub.repository))
        and ".." not in hub.repository
        and bool(_COMMIT.fullmatch(hub.commit))
        and (hub.inside == "" or _name_problem(hub.inside) is None)
    )


def file_below(folder: Path, name: str, *, make_folders: bool = False) -> Path:
    """The path of a file that is, or is to be, below `folder`.

    Args:
        folder: of this machine's choice; it may be a symbolic link itself.
        name: from a manifest that was checked.
        make_folders: makes the folders of `name`.

    Raises:
        RefusedError: a folder of `name` is a symbolic link, or is not a folder; or a part of `name` is "", "." or "..".
        OSError: a folder cannot be made.
    """
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise RefusedError(f"{name!r} is invalid: the name of a file below {folder} must not have empty, . or .. parts")
    path = folder
    for part in name.split("/")[:-1]:
        path = path / part
        if make_folders:
            path.mkdir(exist_ok=True)
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a folder"
            raise RefusedError(f"{path} on {host_name()} is {kind}, and {name} is to be written below it; remove it")
    return folder / name


def _beside(folder: Path, compared: dict[str, str]) -> list[str]:
    """Names of small files that are not compared and that a worker may read."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise RefusedError(f"{folder} cannot be read ({error.strerror})") from None
    return [
        name
        for name in names
        if name not in compared
        and any(fnmatchcase(name, pattern) for pattern in BESIDE_WEIGHTS)
        and _name_problem(name) is None
        and os.access(folder / name, os.R_OK)
        and is_content(folder / name)
        and _is_small(folder / name)
    ]


def _is_small(path: Path) -> bool:
    try:
        return path.stat().st_size <= _LARGEST_BESIDE
    except OSError:
        return False


def _blob(path: Path) -> str:
    """The name of the blob that a file of a hub's snapshot is a link to."""
    try:
        target = os.path.basename(os.readlink(path))
    except OSError:
        return ""
    return target if _BLOB.fullmatch(target) else ""


def _name_problem(name: str) -> str | None:
    """Why it cannot be the name of a file below a folder; None if it can."""
    if not name or name.startswith("/") or "\\" in name or not name.isprintable():
        return "which is not a relative name"
    parts = name.split("/")
    if len(parts) > _MOST_FOLDERS + 1:
        return f"in more than {_MOST_FOLDERS} folders"
    for part in parts:
        if part in ("", ".", ".."):
            return "which leads out of the model's folder"
        if part.startswith("."):
            return "which is hidden"
        try:
            length = len(part.encode())
        except UnicodeEncodeError:
            return "which is not text"
        if length > _LONGEST_PART:
            return f"with more than {_LONGEST_PART} bytes between two slashes"
    return None


def _invalid(wanted: LoadedFiles, what: str) -> str:
    return (
        f"the other machine's list of files of the {wanted.what} has {what}; nothing was copied, rename or remove it "
        "there, or copy the files by hand"
    )
