"""Where copied files go on this machine: the hub's cache, a folder that was mapped, or the folder of copied models.

The other machine chooses none of these folders. Files that are there are never replaced: what has another content is
another version, which is refused, or for which another place is taken.
"""

from __future__ import annotations

import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from vllm_spark.errors import RefusedError
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.model_files.comparison import file_digest
from vllm_spark.executor.model_files.hub_cache import HubPlace, repository_folder
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.executor.model_files.own import copied_place, mapped_place, single_name
from vllm_spark.executor.model_sync.manifest import CopiedFile, Manifest, file_below, is_hub_place

_STAGING = ".vllm-spark-copy"


class Place(ABC):
    """A place for the files of one model.

    Attributes:
        result: the folder or file that a worker loads.
        staging: where files are until they are complete; on the same file system.
    """

    result: Path
    staging: Path

    @abstractmethod
    def find(self, file: CopiedFile) -> Path | None:
        """Where the file is with the same content; None if it is not here.

        Raises:
            RefusedError: another version of it is in its place, or it cannot be read.
        """

    @abstractmethod
    def put(self, arrived: Mapping[CopiedFile, Path], manifest: Manifest) -> None:
        """Moves complete files to where they belong, the configuration last. What is there already stays.

        Args:
            arrived: where the files are that `find` did not find.
            manifest: all files.

        Raises:
            RefusedError: another version is in its place.
            OSError: it cannot be written.
        """

    def conflict(self, manifest: Manifest) -> RefusedError | None:
        """Why the files cannot go there; None if they can."""
        try:
            for file in manifest.files:
                self.find(file)
        except RefusedError as error:
            return error
        return None


class FolderPlace(Place):
    """A folder for one model.

    Args:
        folder: it may be there, with some of the files.
        wanted: what goes there.
        name: of the staging folder; the folder's own by default.
    """

    def __init__(self, folder: Path, wanted: LoadedFiles, name: str | None = None) -> None:
        self._folder, self._wanted = folder, wanted
        self.result = folder / (single_name(wanted) or "")
        # A folder that is there may be a file system of its own.
        self._exists = os.path.isdir(folder)
        self.staging = folder / _STAGING if self._exists else folder.parent / f"{_STAGING}-{name or folder.name}"

    def find(self, file: CopiedFile) -> Path | None:
        """As `Place.find`. A small file that is not compared may differ."""
        path = file_below(self._folder, file.name)
        if not os.path.lexists(path):
            return None
        identity = self._wanted.identity
        if (file.name in identity.configuration or file.name in identity.weights) and file_digest(path) != file.digest:
            raise RefusedError(_other_version(path, self._wanted, self._folder))
        return path

    def put(self, arrived: Mapping[CopiedFile, Path], manifest: Manifest) -> None:
        """As `Place.put`: at once if there is no such folder yet."""
        target = self._folder if self._exists else self.staging / "tree"
        if not self._exists:
            shutil.rmtree(target, ignore_errors=True)  # of an earlier attempt
            target.mkdir()
        for file in _configuration_last(arrived, self._wanted):
            _move(arrived[file], file_below(target, file.name, make_folders=True), file)
        if not self._exists:
            os.rename(target, self._folder)


class SnapshotPlace(Place):
    """A commit in a hub's cache: files in `blobs/`, links to them in `snapshots/COMMIT/`, branches in `refs/`.

    Args:
        hub: of the other machine; `is_hub_place`.
        wanted: what goes there.
        cache: the cache's folder; None for this user's.
    """

    def __init__(self, hub: HubPlace, wanted: LoadedFiles, cache: str | Path | None = None) -> None:
        self._wanted = wanted
        self._folder = repository_folder(hub.repository, cache)
        self._snapshot = self._folder / "snapshots" / hub.commit
        self._commit = hub.commit
        inside = [part for part in hub.inside.split("/") if part]
        self._prefix = "".join(f"{part}/" for part in (inside if single_name(wanted) is None else inside[:-1]))
        self.result = self._snapshot / hub.inside
        self.staging = self._folder / _STAGING

    def find(self, file: CopiedFile) -> Path | None:
        """As `Place.find`; also in a blob of another commit."""
        path = file_below(self._snapshot, self._prefix + file.name)
        if os.path.lexists(path):
            if file_digest(path) != file.digest:
                raise RefusedError(_other_version(path, self._wanted, self._snapshot))
            return path
        if file.blob and os.path.isfile(blob := self._folder / "blobs" / file.blob):
            return blob if blob.stat().st_size == file.size and file_digest(blob) == file.digest else None
        return None

    def put(self, arrived: Mapping[CopiedFile, Path], manifest: Manifest) -> None:
        """As `Place.put`: the snapshot at once if it is not there yet."""
        exists = os.path.isdir(self._snapshot)
        target = self._snapshot if exists else self.staging / "tree"
        if not exists:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
        blobs = self._folder / "blobs"
        blobs.mkdir(exist_ok=True)
        for file in _configuration_last(manifest.files, self._wanted):
            name = self._prefix + file.name
            path = file_below(target, name, make_folders=True)
            if os.path.lexists(path):
                continue  # `find` has compared it
            blob = blobs / file.blob if file.blob else None
            if blob is not None and file in arrived and not os.path.lexists(blob):
                _move(arrived[file], blob, file)
            elif file in arrived:
                _move(arrived[file], path, file)
                continue
            if blob is not None:
                os.symlink(os.path.join(*[".."] * (2 + name.count("/")), "blobs", file.blob), path)
        if not exists:
            self._snapshot.parent.mkdir(exist_ok=True)
            os.rename(target, self._snapshot)
        for ref in manifest.refs:
            _add_ref(self._folder / "refs" / ref, self._commit)


def choose_place(
    wanted: LoadedFiles, manifest: Manifest, mapping: Mapping[str, Path], cache: str | Path | None = None
) -> Place:
    """The place for what the other machine has.

    The mapped folder if there is one; the hub's cache if it comes from there, and that commit is not here with other
    files; else the folder of copied models, where a folder is named by its content.

    Args:
        wanted: what is copied.
        manifest: its files.
        mapping: folders of this machine, by the other one's names or paths.
        cache: the hub cache's folder; None for this user's.

    Raises:
        RefusedError: the mapped folder has another version; or this user has no home folder.
    """
    if (mapped := mapped_place(wanted, mapping)) is not None:
        place: Place = FolderPlace(mapped, wanted)
        if error := place.conflict(manifest):
            raise error
        if not os.path.isdir(mapped.parent):
            raise RefusedError(
                f"the folder {mapped} for {wanted.name} cannot be made, because there is no {mapped.parent} on "
                f"{host_name()}; make that folder, or give another one with --model-path"
            )
        return place
    hub = wanted.hub
    if hub is not None and is_hub_place(hub.repository, hub.commit) and _is_inside(hub.inside):
        place = SnapshotPlace(hub, wanted, cache)
        if _may_write(place.staging) and place.conflict(manifest) is None:
            return place
    copied = copied_place(wanted)
    if copied is None:
        raise RefusedError(
            f"the user on {host_name()} has no home folder for the {wanted.what}; give a folder for it: "
            f"vllm-spark join --model-path {wanted.name}=FOLDER"
        )
    folder = copied if single_name(wanted) is None else copied.parent
    # Without the digest: if the other machine's files change meanwhile, those that stay the same are not copied again.
    return FolderPlace(folder, wanted, folder.name.rpartition("-")[0])


def free_bytes(place: Place) -> int:
    """Bytes that this user may still write at a place whose staging folder is there."""
    found = os.statvfs(place.staging)
    return found.f_bavail * found.f_frsize


def _configuration_last(files: Mapping[CopiedFile, Path] | list[CopiedFile], wanted: LoadedFiles) -> list[CopiedFile]:
    return sorted(files, key=lambda file: (file.name in wanted.identity.configuration, file.name))


def _move(source: Path, target: Path, file: CopiedFile) -> None:
    """Moves a file to a name that is not in use."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        if file_digest(target) != file.digest:
            raise RefusedError(
                f"{target} on {host_name()} was made with another content while the file was copied; remove one of both"
            ) from None
    except OSError:  # a file system without links
        if os.path.lexists(target):
            raise
        os.rename(source, target)
        return
    source.unlink()


def _add_ref(path: Path, commit: str) -> None:
    """Says which commit a branch is, if that is not known here."""
    path.parent.mkdir(exist_ok=True)
    if not os.path.lexists(path):
        path.write_text(commit)


def _is_inside(inside: str) -> bool:
    return all(re.fullmatch(r"[^./\0][^/\0]*", part) for part in inside.split("/")) if inside else True


def _may_write(folder: Path) -> bool:
    """Whether this user may make the folder, or write into it."""
    for each in (folder, *folder.parents):
        if os.path.lexists(each):
            return os.path.isdir(each) and os.access(each, os.W_OK | os.X_OK)
    return False


def _other_version(path: Path, wanted: LoadedFiles, folder: Path) -> str:
    return (
        f"{path} on {host_name()} has other content than the other machine's {wanted.what}, and is not replaced; move "
        f"{folder} away, or give another folder: vllm-spark join --model-path {wanted.name}=FOLDER"
    )
