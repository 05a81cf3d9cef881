"""Where this machine has what its leader loads: found by what it is, not by the leader's path."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from vllm_spark.errors import RefusedError, first_line
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.model_files import hub_cache
from vllm_spark.executor.model_files.hub_cache import HubPlace, cached_snapshot, cached_snapshots
from vllm_spark.executor.model_files.loaded import BESIDE_WEIGHTS, LoadedFiles
from vllm_spark.executor.model_files.modelscope_cache import all_in_modelscope, cached_in_modelscope
from vllm_spark.files import data_folder
from vllm_spark.records import to_json


def find_own(
    wanted: LoadedFiles,
    report: Callable[[str], None] = lambda activity: None,
    *,
    mapping: Mapping[str, Path] = MappingProxyType({}),
    download: bool = True,
) -> Path:
    """The folder or file of this machine that holds what the leader has in `wanted`.

    Looked for in the folder that its name is mapped to, in this user's cache of the hub (the same commit, then any
    other of that repository), then at the leader's path, among what was copied from a leader, then among everything in
    the cache; downloaded, as the leader's vLLM would, if this user may.

    Args:
        wanted: what the leader has.
        report: called with what is being done before something that may take minutes.
        mapping: folders of this machine, by the leader's names or paths.
        download: False if it is not to be downloaded.

    Raises:
        RefusedError: it is not on this machine, or differs; the sentence names this machine and the remedy.
    """
    problem, missing = "", True
    for place in _candidates(wanted, mapping):
        difference = _difference(place, wanted)
        if difference is None:
            return place
        if not problem:
            problem = f"{difference} ({place})"
            missing = "is missing" in difference
    if not missing and wanted.hub is not None:
        missing = cached_snapshot(wanted.hub.repository, wanted.hub.commit) is None
    failure = ""
    if download and missing and (source := _source(wanted)) is not None:
        report(f"downloading {wanted.name}")
        try:
            place = source()
        except Exception as error:
            failure = first_line(error)
        else:
            difference = _difference(place, wanted)
            if difference is None:
                return place
            problem = f"{difference} ({place})"
    raise RefusedError(_refusal(wanted, problem, failure))


def content_key(wanted: LoadedFiles) -> str:
    """What names the content of a model on both machines: 32 hexadecimal digits."""
    digest = hashlib.blake2b(wanted.kind.encode(), digest_size=16)
    digest.update(to_json(wanted.identity))
    return digest.hexdigest()


def mapped_place(wanted: LoadedFiles, mapping: Mapping[str, Path]) -> Path | None:
    """The folder of this machine that a leader's name or path is mapped to; None if it is not."""
    names = [wanted.name, wanted.place, *([wanted.hub.repository] if wanted.hub is not None else [])]
    return next((mapping[name] for name in names if name in mapping), None)


def copied_place(wanted: LoadedFiles) -> Path | None:
    """Where it is in the folder of copied models, if it is there; None for a user without a home folder."""
    folder = data_folder()
    if folder is None:
        return None
    base = re.sub(r"[^A-Za-z0-9._-]", "_", os.path.basename(wanted.name.rstrip("/"))).lstrip(".")[:80]
    return folder / "models" / f"{base or wanted.kind}-{content_key(wanted)[:16]}" / (single_name(wanted) or "")


def _copied_places(wanted: LoadedFiles) -> Iterator[Path]:
    """Where the same content was copied to, under this name or another one."""
    folder = data_folder()
    if folder is not None:
        for place in sorted((folder / "models").glob(f"*-{content_key(wanted)[:16]}")):
            yield place / (single_name(wanted) or "")


def single_name(wanted: LoadedFiles) -> str | None:
    """The file's name if a single file is wanted; None if it is a folder."""
    if wanted.kind != "file" and not wanted.single_file:
        return None
    name = os.path.basename(wanted.place)
    return name if name not in ("", ".", "..") else "file"


def _candidates(wanted: LoadedFiles, mapping: Mapping[str, Path]) -> Iterator[Path]:
    """Places of this machine that may hold it, each once, the likeliest first. Only a look at content decides."""
    seen: set[str] = set()
    for place in _all_candidates(wanted, mapping):
        if (name := os.path.abspath(place)) not in seen:
            seen.add(name)
            try:
                os.stat(place)
            except PermissionError:
                pass  # whoever reads it is told
            except OSError:
                continue
            yield place


def _all_candidates(wanted: LoadedFiles, mapping: Mapping[str, Path]) -> Iterator[Path]:
    hub = wanted.hub
    if (mapped := mapped_place(wanted, mapping)) is not None:
        yield mapped / (single_name(wanted) or "") if os.path.isdir(mapped) else mapped
    if hub is not None:
        if (snapshot := cached_snapshot(hub.repository, hub.commit)) is not None:
            yield snapshot / hub.inside
        for snapshot in cached_snapshots(hub.repository):
            yield snapshot / hub.inside
    if wanted.origin == "modelscope":
        yield from cached_in_modelscope(wanted.name)
    if wanted.origin != "object storage":
        yield Path(wanted.place)
        yield from _copied_places(wanted)
    if hub is None and wanted.kind == "model" and wanted.origin == "path":
        yield from (place for place in _everything_cached() if _configuration_fits(place, wanted))


def _everything_cached() -> Iterator[Path]:
    yield from cached_snapshots()
    yield from all_in_modelscope()


def _configuration_fits(place: Path, wanted: LoadedFiles) -> bool:
    """Whether it is worth reading the weights there."""
    try:
        mine = wanted.identity_at(place, with_weights=False)
    except RefusedError:
        return False
    return bool(mine.configuration) and mine.configuration == wanted.identity.configuration


def _difference(place: Path, wanted: LoadedFiles) -> str | None:
    """What differs there from the leader's, as a part of a sentence; None if nothing does."""
    try:
        mine = wanted.identity_at(place)
    except RefusedError as error:
        return str(error)
    if wanted.kind == "file" or not os.path.isdir(place):
        same = list(mine.weights.values()) == list(wanted.identity.weights.values())  # whatever the files are called
        return None if same else f"the {wanted.what} has other content on {host_name()}"
    return mine.difference(wanted.identity, f"on {host_name()}")


def _source(wanted: LoadedFiles) -> Callable[[], Path] | None:
    """What fetches it to this machine, if it can be fetched and this user may."""
    if wanted.origin == "object storage":
        return lambda: _pull_from_object_storage(wanted.name)
    if wanted.origin == "modelscope":
        return lambda: _download_from_modelscope(wanted.name)
    hub = wanted.hub
    if hub is None or not hub_cache.may_download():
        return None
    return lambda: hub_cache.download(hub, _names_to_download(wanted, hub)) / hub.inside


def _names_to_download(wanted: LoadedFiles, hub: HubPlace) -> list[str]:
    if wanted.single_file:
        return [hub.inside]
    inside = f"{hub.inside}/" if hub.inside else ""
    names = [*wanted.identity.configuration, *wanted.identity.weights]
    return [*(inside + name for name in names), *(inside + pattern for pattern in BESIDE_WEIGHTS)]


def _pull_from_object_storage(url: str) -> Path:
    from vllm.transformers_utils.runai_utils import ObjectStorageModel

    storage = ObjectStorageModel(url=url)
    storage.pull_files(url, allow_pattern=["*.model", "*.py", "*.json"])
    return Path(storage.dir)


def _download_from_modelscope(name: str) -> Path:
    from modelscope.hub.snapshot_download import snapshot_download

    return Path(snapshot_download(name, local_files_only=not hub_cache.may_download()))


def _refusal(wanted: LoadedFiles, problem: str, failure: str) -> str:
    host, what = host_name(), wanted.what
    if problem and not failure:
        damaged = "is missing" not in problem
        return f"{problem}, compared with the leader; {_remedy(wanted, damaged=damaged)}"
    reason = f" ({failure})" if failure else ""
    if wanted.hub is not None:
        name = wanted.name if wanted.origin == "hub" else wanted.hub.repository
        state = f"the {what} {name}, commit {wanted.hub.commit}, is not"
    elif wanted.origin == "path":
        return f"there is no {what} in {wanted.place} on {host}; copy the leader's there"
    else:
        state = f"the {what} {wanted.name} is not"
    if problem:
        reason = f" ({failure}; {problem})"
    return f"{state} on {host}{reason}; {_remedy(wanted)}"


def _remedy(wanted: LoadedFiles, *, damaged: bool = False) -> str:
    """What to do about it, and on which machine."""
    host = host_name()
    if wanted.origin == "modelscope":
        return f"download it on {host}: modelscope download --model {wanted.name}"
    if wanted.origin == "object storage":
        return f"pip install runai-model-streamer on {host}, and let it reach that storage"
    if (hub := wanted.hub) is not None:
        command = f"hf download {hub.repository} --revision {hub.commit}"
        if damaged and (snapshot := cached_snapshot(hub.repository, hub.commit)) is not None:
            # The same commit with other content: a download would find it complete.
            return f"delete {snapshot.parents[1]} on {host} and download it anew: {command}"
        return f"download it on {host}: {command}"
    return f"copy the leader's {wanted.what} to {wanted.place} on {host}"
