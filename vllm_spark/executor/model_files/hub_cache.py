"""Models that were downloaded from the Hugging Face hub: which ones they are, and where they are on this machine.

The hub's cache is `models--ORGANIZATION--NAME/snapshots/COMMIT/`, below a folder that each user chooses. A path in it
says what a model is, and the same commit is found in another user's cache.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_spark.files import SMALL_FILE, read_regular

_PREFIX = "models--"
_SNAPSHOTS = "snapshots"
_DEFAULT_REVISION = "main"


@dataclasses.dataclass(frozen=True)
class HubPlace:
    """Something in a repository of the hub.

    Attributes:
        repository: `ORGANIZATION/NAME`.
        commit: which state of it.
        inside: what is meant, relative to the repository; empty for all of it.
    """

    repository: str
    commit: str
    inside: str = ""


def is_path(name: str) -> bool:
    """Whether a model's name is a path, as vLLM takes it, and not a name of a hub."""
    return os.path.isabs(os.path.expanduser(name)) or name.startswith(".")


def hub_place_of(path: Path) -> HubPlace | None:
    """What `path` is if it lies in a hub's cache; None if it does not."""
    parts = path.parts
    for index in range(len(parts) - 1, 1, -1):
        if parts[index - 1] == _SNAPSHOTS and parts[index - 2].startswith(_PREFIX):
            repository = parts[index - 2].removeprefix(_PREFIX).replace("--", "/")
            return HubPlace(repository, parts[index], "/".join(parts[index + 1 :]))
    return None


def cached_snapshot(repository: str, revision: str | None, cache: str | Path | None = None) -> Path | None:
    """The folder of a repository's state that was downloaded before; None if it was not.

    A snapshot may be incomplete: its files are looked at by whoever needs them. huggingface_hub's own look-up demands
    every file of the repository, of which vLLM downloads those alone that it loads.

    Args:
        repository: `ORGANIZATION/NAME`.
        revision: a commit, or a branch or tag that was resolved when it was downloaded; None for the default branch.
        cache: the cache's folder; None for this user's.
    """
    folder = repository_folder(repository, cache)
    # vLLM may have resolved it already: a string with a commit.
    name = str(getattr(revision, "resolved", None) or revision or _DEFAULT_REVISION)
    if not name or ".." in name.split("/"):
        return None
    if os.path.isdir(snapshot := folder / _SNAPSHOTS / name):
        return snapshot
    commit = _commit_in(folder / "refs" / name)
    snapshot = folder / _SNAPSHOTS / commit
    return snapshot if commit and os.path.isdir(snapshot) else None


def cached_snapshots(repository: str | None = None, cache: str | Path | None = None) -> Iterator[Path]:
    """All snapshots of a repository, or of every model, in the cache of this user; the newest first."""
    folders = [repository_folder(repository, cache)] if repository else sorted(_cache(cache).glob(f"{_PREFIX}*"))
    for folder in folders:
        try:
            yield from sorted((folder / _SNAPSHOTS).iterdir(), key=lambda path: -path.stat().st_mtime)
        except OSError:  # there is none, or this user may not look
            continue


def refs_to(path: Path, place: HubPlace) -> list[str]:
    """The branches and tags that mean the commit `place` in the cache in which `path` lies."""
    refs = path.parents[len(Path(place.inside).parts) + 1] / "refs"
    try:
        return sorted(each.name for each in refs.iterdir() if _commit_in(each) == place.commit)
    except OSError:
        return []


def repository_folder(repository: str, cache: str | Path | None = None) -> Path:
    """The folder of a repository in a cache, whether it is there or not.

    Args:
        repository: `ORGANIZATION/NAME`.
        cache: the cache's folder; None for this user's.
    """
    return _cache(cache) / (_PREFIX + repository.replace("/", "--"))


def download(
    place: HubPlace, names: Sequence[str], cache: str | Path | None = None, ignore: str | Sequence[str] | None = None
) -> Path:
    """Downloads files of a repository, as vLLM would; returns the snapshot's folder.

    Args:
        place: which repository, and which of its commits.
        names: of the files, with wildcards.
        cache: the cache's folder; None for this user's.
        ignore: names that are not wanted, with wildcards.

    Raises:
        Exception: whatever huggingface_hub raises: it cannot be reached, has no such model, or wants a token.
    """
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            place.repository,
            revision=place.commit,
            allow_patterns=list(names),
            ignore_patterns=ignore if ignore is None or isinstance(ignore, str) else list(ignore),
            cache_dir=cache,
        )
    )


def may_download() -> bool:
    """Whether this user lets processes go to the hub (HF_HUB_OFFLINE is not set)."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return False
    offline: Any = constants.HF_HUB_OFFLINE
    return not offline


def _cache(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(os.path.expanduser(cache))
    try:
        from huggingface_hub import constants
    except ImportError:
        return Path(os.path.expanduser("~/.cache/huggingface/hub"))
    return Path(constants.HF_HUB_CACHE)


def _commit_in(ref: Path) -> str:
    """The commit that a file in `refs/` has; empty if it cannot be read."""
    try:
        return read_regular(ref, SMALL_FILE).decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""
