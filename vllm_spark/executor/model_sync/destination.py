"""Where copied files go on this machine: the hub's cache, a folder that was mapped, or the folder of copied models.

The other machine chooses none of these folders. Files that are there are never replaced: what has another content is
another version, which is refused, or for which another place is taken.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from vllm_spark.errors import RefusedError
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.model_files.comparison import file_digest
from vllm_spark.executor.model_files.hub_cache import HubPlace, repository_folder
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.executor.model_files.own import copied_place, mapped_place, single_name
from vllm_spark.executor.model_files.weights import weight_files
from vllm_spark.executor.model_sync.manifest import CopiedFile, Manifest, file_below, is_hub_place
from vllm_spark.executor.model_sync.remedies import Remedies, follower_remedies
from vllm_spark.executor.model_sync.staging import TREE, Staging

_STAGING = ".vllm-spark-copy"


class Place(ABC):
    """A place for the files of one model.

    Attributes:
        wanted: what goes there.
        result: the folder or file that a worker loads.
        staging: where files are until they are complete; on the same file system.
        remedies: what a user of this machine can do about an error.
    """

    wanted: LoadedFiles
    result: Path
    staging: Path
    remedies: Remedies

    @abstractmethod
    def find(self, file: CopiedFile) -> Path | None:
        """Where the file is with the same content; None if it is not here.

        Raises:
            RefusedError: another version of it is in its place, or it cannot be read.
        """

    @abstractmethod
    def put(self, arrived: Mapping[CopiedFile, Path], manifest: Manifest) -> None:
        """Links complete files to where they belong, the configuration last. What is there already stays.

        Where the file system has no links, they are moved. `recover` was called before.

        Args:
            arrived: where the files are that `find` did not find.
            manifest: all files.

        Raises:
            RefusedError: another version is in its place.
            OSError: it cannot be written.
        """

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The folder that the names of the manifest are relative to."""

    def conflict(self, manifest: Manifest) -> RefusedError | None:
        """Why the files cannot go there; None if they can."""
        if os.path.lexists(self.folder) and not os.path.isdir(self.folder):
            kind = "a symbolic link to nothing" if os.path.islink(self.folder) else "not a folder"
            return RefusedError(
                f"{self.folder} on {host_name()} is {kind}, and the {self.wanted.what} is to be copied there; remove it"
            )
        try:
            for file in manifest.files:
                self.find(file)
            further = _further_files(self.folder, self.wanted, manifest)
        except RefusedError as error:
            return error
        return RefusedError(self._has_further(further)) if further else None

    def _has_further(self, names: list[str]) -> str:
        more = f" and {len(names) - 1} more files" if len(names) > 1 else ""
        return (
            f"{self.folder} on {host_name()} has {names[0]}{more}, which the other machine's {self.wanted.what} does "
            f"not have, and nothing was copied; move {self.folder} away, or {self.remedies.folder}"
        )

    def _other_version(self, path: Path) -> str:
        return (
            f"{path} on {host_name()} has other content than the other machine's {self.wanted.what}, and is not "
            f"replaced; move {self.folder} away, or {self.remedies.folder}"
        )

    def recover(self, staging: Staging, manifest: Manifest) -> None:
        """Takes back what an earlier `put` that failed or was killed has left in the staging folder.

        Args:
            staging: this place's.
            manifest: all files.

        Raises:
            OSError: the staging folder cannot be written.
        """
        tree = staging.tree
        for file in manifest.files:
            path, data = file_below(tree, self._inside(file)), staging.data(file)
            # Without links of the file system, `put` has moved the only copy. Its ranges are compared again.
            if not os.path.lexists(data) and path.is_file() and not path.is_symlink():
                os.rename(path, data)
        staging.remove_tree()
        for file in manifest.files:
            # Another name of a file that is where it belongs: nothing may be written to it.
            if staging.is_linked(file):
                staging.forget(file)

    def _inside(self, file: CopiedFile) -> str:
        """The name of a file in a new folder."""
        return file.name


class FolderPlace(Place):
    """A folder for one model.

    Args:
        folder: it may be there, with some of the files.
        wanted: what goes there.
        name: of the staging folder; the folder's own by default.
        remedies: by default a follower's.
    """

    def __init__(
        self, folder: Path, wanted: LoadedFiles, name: str | None = None, *, remedies: Remedies | None = None
    ) -> None:
        self.remedies = remedies or follower_remedies(wanted.name)
        self._folder, self.wanted = folder, wanted
        self.result = folder / (single_name(wanted) or "")
        # A folder that is there may be a file system of its own.
        self._exists = os.path.isdir(folder)
        self.staging = folder / _STAGING if self._exists else folder.parent / f"{_STAGING}-{name or folder.name}"

    @property
    def folder(self) -> Path:
        """As `Place.folder`."""
        return self._folder

    def find(self, file: CopiedFile) -> Path | None:
        """As `Place.find`. A small file that is not compared may differ."""
        path = file_below(self._folder, file.name)
        if not os.path.lexists(path):
            return None
        if file.name in self.wanted.identity.digests and file_digest(path) != file.digest:
            raise RefusedError(self._other_version(path))
        return path

    def put(self, arrived: Mapping[CopiedFile, Path], manifest: Manifest) -> None:
        """As `Place.put`: at once if there is no such folder yet."""
        target = self._folder if self._exists else self.staging / TREE
        if not self._exists:
            target.mkdir()
        for file in _configuration_last(arrived, self.wanted):
            _link(arrived[file], file_below(target, file.name, make_folders=True), file)
        if not self._exists:
            os.rename(target, self._folder)


class SnapshotPlace(Place):
    """A commit in a hub's cache: files in `blobs/`, links to them in `snapshots/COMMIT/`, branches in `refs/`.

    Args:
        hub: of the other machine.
        wanted: what goes there.
        cache: the cache's folder; None for this user's.
        remedies: by default a follower's.

    Raises:
        RefusedError: `hub` is not `is_hub_place`: it may lead out of the cache.
    """

    def __init__(
        self,
        hub: HubPlace,
        wanted: LoadedFiles,
        cache: str | Path | None = None,
        *,
        remedies: Remedies | None = None,
    ) -> None:
        self.remedies = remedies or follower_remedies(wanted.name)
        if not is_hub_place(hub):
            raise RefusedError(
                f"the other machine has the {wanted.what} at {hub.inside!r} in commit {hub.commit!r} of "
                f"{hub.repository!r}, which is not a place in a cache of the hub; copy the files by hand"
            )
        self.wanted = wanted
        self._folder = repository_folder(hub.repository, cache)
        self._snapshot = self._folder / "snapshots" / hub.commit
        self._commit = hub.commit
        inside = [part for part in hub.inside.split("/") if part]
        self._prefix = "".join(f"{part}/" for part in (inside if single_name(wanted) is None else inside[:-1]))
        self.result = self._snapshot / hub.inside
        self.staging = self._folder / _STAGING

    @property
    def folder(self) -> Path:
        """As `Place.folder`."""
        return self._snapshot / self._prefix

    def _inside(self, file: CopiedFile) -> str:
        return self._prefix + file.name

    def find(self, file: CopiedFile) -> Path | None:
        """As `Place.find`; also in a blob of another commit."""
        path = file_below(self._snapshot, self._prefix + file.name)
        if os.path.lexists(path):
            if file_digest(path) != file.digest:
                raise RefusedError(self._other_version(path))
            return path
        if file.blob and os.path.isfile(blob := self._folder / "blobs" / file.blob):
            return blob if blob.stat().st_size == file.size and file_digest(blob) == file.digest else None
        return None

    def put(self, arrived: Mapping[CopiedFile, Path], manifest: Manifest) -> None:
        """As `Place.put`: the snapshot at once if it is not there yet."""
        exists = os.path.isdir(self._snapshot)
        target = self._snapshot if exists else self.staging / TREE
        if not exists:
            target.mkdir()
        blobs = self._folder / "blobs"
        blobs.mkdir(exist_ok=True)
        for file in _configuration_last(manifest.files, self.wanted):
            name = self._prefix + file.name
            path = file_below(target, name, make_folders=True)
            if os.path.lexists(path):
                continue  # `find` has compared it
            blob = blobs / file.blob if file.blob else None
            if blob is not None and file in arrived and not os.path.lexists(blob):
                _link(arrived[file], blob, file)
            elif file in arrived:
                _link(arrived[file], path, file)
                continue
            if blob is not None:
                os.symlink(os.path.join(*[".."] * (2 + name.count("/")), "blobs", file.blob), path)
        if not exists:
            self._snapshot.parent.mkdir(exist_ok=True)
            os.rename(target, self._snapshot)
        for ref in manifest.refs:
            _add_ref(self._folder / "refs" / ref, self._commit)


def choose_place(
    wanted: LoadedFiles,
    manifest: Manifest,
    mapping: Mapping[str, Path],
    cache: str | Path | None = None,
    *,
    remedies: Remedies | None = None,
) -> Place:
    """The place for what the other machine has.

    The mapped folder if there is one; the hub's cache if it comes from there, and that commit is not here with other
    files; else the folder of copied models, where a folder is named by its content.

    Args:
        wanted: what is copied.
        manifest: its files.
        mapping: folders of this machine, by the other one's names or paths.
        cache: the hub cache's folder; None for this user's.
        remedies: what a user of this machine can do about an error; by default a follower's.

    Raises:
        RefusedError: the mapped folder, or that of copied models, has another version; or this user has no home folder.
    """
    remedies = remedies or follower_remedies(wanted.name)
    if (mapped := mapped_place(wanted, mapping)) is not None:
        place: Place = FolderPlace(mapped, wanted, remedies=remedies)
        if error := place.conflict(manifest):
            raise error
        if not os.path.isdir(mapped.parent):
            raise RefusedError(
                f"the folder {mapped} for {wanted.name} cannot be made, because there is no {mapped.parent} on "
                f"{host_name()}; make that folder, or give another one with --model-path"
            )
        return place
    hub = wanted.hub
    if hub is not None and is_hub_place(hub):
        place = SnapshotPlace(hub, wanted, cache, remedies=remedies)
        if _may_write(place.staging) and place.conflict(manifest) is None:
            return place
    copied = copied_place(wanted)
    if copied is None:
        raise RefusedError(f"the user on {host_name()} has no home folder for the {wanted.what}; {remedies.folder}")
    folder = copied if single_name(wanted) is None else copied.parent
    # Without the digest: if the other machine's files change meanwhile, those that stay the same are not copied again.
    place = FolderPlace(folder, wanted, folder.name.rpartition("-")[0], remedies=remedies)
    if error := place.conflict(manifest):
        raise error
    return place


def free_bytes(place: Place) -> int:
    """Bytes that this user may still write at a place whose staging folder is there."""
    found = os.statvfs(place.staging)
    return found.f_bavail * found.f_frsize


def _configuration_last(files: Mapping[CopiedFile, Path] | list[CopiedFile], wanted: LoadedFiles) -> list[CopiedFile]:
    return sorted(files, key=lambda file: (file.name in wanted.identity.configuration, file.name))


def _link(source: Path, target: Path, file: CopiedFile) -> None:
    """Gives a file a further name that is not in use; moves it where there are no links."""
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


def _add_ref(path: Path, commit: str) -> None:
    """Records which commit a branch is, if there is no such branch here."""
    path.parent.mkdir(exist_ok=True)
    if not os.path.lexists(path):
        path.write_text(commit)


def _may_write(folder: Path) -> bool:
    """Whether this user may make the folder, or write into it."""
    for each in (folder, *folder.parents):
        if os.path.lexists(each):
            return os.path.isdir(each) and os.access(each, os.W_OK | os.X_OK)
    return False


def _further_files(folder: Path, wanted: LoadedFiles, manifest: Manifest) -> list[str]:
    """Names of files in a folder that would be compared, and that the other machine does not have.

    Raises:
        RefusedError: a file in it cannot be read.
    """
    if single_name(wanted) is not None or not os.path.isdir(folder):
        return []
    further = wanted.identity_at(folder).digests.keys() - wanted.identity.digests.keys()
    if wanted.kind == "model":
        # Some weight files are not loaded once those that are copied are beside them.
        here = os.listdir(folder)
        together = sorted({*here, *(file.name for file in manifest.files)})
        further -= {*weight_files(folder, here, wanted.load_format)} - {
            *weight_files(folder, together, wanted.load_format)
        }
    return sorted(further)
