"""What a copy leaves alone, refuses before the first byte, and keeps when it fails or is killed."""

from __future__ import annotations

import errno
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_spark.errors import RefusedError
from vllm_spark.executor.channel.framing import Kind
from vllm_spark.executor.handshake.messages import Sought
from vllm_spark.executor.model_files.hub_cache import HubPlace
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.executor.model_sync import fetch_from_follower, stream
from vllm_spark.executor.model_sync.destination import FolderPlace, Place, SnapshotPlace, choose_place
from vllm_spark.executor.model_sync.manifest import file_below, list_files
from vllm_spark.executor.model_sync.staging import Staging
from vllm_spark.records import to_json

from .test_model_copy_limits import connection_of_two, copy, model, wanted_of

__all__ = ["model"]

HUB = HubPlace("somebody/tiny", "0" * 40)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("inside", ["../../../../outside/.ssh", "..", "a/../../b", "/etc", "a//b", ".ssh", "a\0"])
def test_a_place_in_a_snapshot_that_leads_out_of_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    """In an OFFER and in a FOUND: neither is a place of the cache."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    wanted = wanted_of(model, HubPlace(HUB.repository, HUB.commit, inside))
    manifest, _ = list_files(wanted_of(model))
    sought = Sought("model", HUB.repository, "model")
    for place in (
        choose_place(wanted, manifest, {}, tmp_path / "hub"),
        fetch_from_follower._place_of(sought, wanted, manifest, str(tmp_path / "hub")),
    ):
        assert place.result.parent == tmp_path / "data/vllm-spark/models"
    with pytest.raises(RefusedError, match="which is not a place in a cache of the hub"):
        SnapshotPlace(wanted.hub, wanted, tmp_path / "hub")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["../x", "a/../x", "a/..", ".", "a//x", "", "./x"])
def test_a_file_below_a_folder_is_never_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(RefusedError, match="must not have empty"):
        file_below(tmp_path / "folder", name, make_folders=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "file"])
def test_something_else_in_place_of_the_folder(model: Path, tmp_path: Path, kind: str) -> None:
    """Refused before anything is copied: for a mapped folder, a leader's path, and a copied model's folder."""
    wanted, (manifest, _) = wanted_of(model), list_files(wanted_of(model))
    here = tmp_path / "here"
    if kind == "link":
        here.symlink_to(tmp_path / "absent")
    else:
        here.write_text("precious")
    sentence = rf"{here} on .* is (a symbolic link to nothing|not a folder), and the model is to be copied there"
    with pytest.raises(RefusedError, match=sentence):
        choose_place(wanted, manifest, {"/alice": here})
    with pytest.raises(RefusedError, match=sentence):
        fetch_from_follower._place_of(Sought("model", str(here), "model"), wanted, manifest, None)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("kind", ["folder", "snapshot"])
def test_what_arrived_is_kept_when_it_cannot_be_put_in_place(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, links: bool
) -> None:
    """Whether the file system has links or not; nothing is left of the first attempt either."""

    def place() -> Place:
        if kind == "folder":
            return FolderPlace(tmp_path / "bob", wanted_of(model))
        return SnapshotPlace(HUB, wanted_of(model, HUB), tmp_path / "hub")

    rename = os.rename

    def fail_at_the_end(source: Path, target: Path) -> None:
        if Path(source).name == "tree":
            raise OSError(errno.EIO, "Input/output error", str(target))
        rename(source, target)

    def no_links(*given: object, **more: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_at_the_end)
        with pytest.raises(RefusedError, match="Input/output error"):
            copy(wanted_of(model), place())
    assert copy(wanted_of(model), place()) == 0
    assert files_in(place().result) == files_in(model)
    assert [path for path in tmp_path.rglob("*") if "vllm-spark-copy" in path.name or path.name == "tree"] == []


def test_a_file_in_place_is_never_written_to(model: Path, tmp_path: Path) -> None:
    """A process that is killed after the last step leaves further names of files that are in place."""
    wanted, (manifest, _) = wanted_of(model), list_files(wanted_of(model))
    place = FolderPlace(tmp_path / "bob", wanted)
    precious = tmp_path / "precious"
    precious.write_bytes(b"of bob")
    with Staging(place.staging) as staging:
        for file in manifest.files:
            os.link(precious, staging.data(file))
    assert copy(wanted, place) == manifest.size
    assert precious.read_bytes() == b"of bob"


def test_the_folder_of_copied_parts_is_removed_with_a_tree_in_it(tmp_path: Path) -> None:
    with Staging(tmp_path / "s") as staging:
        (tmp_path / "s/tree/sub").mkdir(parents=True)
        (tmp_path / "s/tree/sub/file").write_text("")
        staging.remove()
    assert not (tmp_path / "s").exists()


def test_a_stream_has_one_file_open(tmp_path: Path) -> None:
    """A model may have more files than a process may have descriptors."""
    near, far = connection_of_two()
    jobs = io.BytesIO(b"".join(to_json(stream.Job("", n, str(tmp_path / f"{n}.data"), 0, 0)) + b"\n" for n in range(5)))
    numbers: list[int] = []

    class Events(io.BytesIO):
        def flush(self) -> None:
            opened = [os.readlink(each.path) for each in os.scandir("/proc/self/fd") if os.path.islink(each.path)]
            numbers.append(sum(path.startswith(str(tmp_path)) for path in opened))

    with ThreadPoolExecutor() as pool:

        def send() -> None:
            for _ in range(5):
                near.expect(Kind.COPY_RANGE, timeout=20)
                near.send(Kind.COPY_END)

        pool.submit(send)
        stream.run(lambda: far, jobs, Events())
    near.close()
    assert numbers == [1] * 5


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json"])
def test_a_folder_with_further_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It would differ from the other machine's after all bytes: refused, or another place is taken."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    (theirs / "pytorch_model.bin").write_bytes(b"weights")
    snapshot = tmp_path / f"hub/models--somebody--tiny/snapshots/{HUB.commit}"
    for folder in (mine, snapshot):
        folder.mkdir(parents=True)
        (folder / name).write_text("{}")
    wanted = wanted_of(theirs, HUB)
    if name == "preprocessor_config.json":
        wanted = LoadedFiles(**{**vars(wanted), "with_tokenizer": True})
    manifest, _ = list_files(wanted)
    sentence = rf"{mine} on .* has {name}, which the other machine's model does not have, and nothing was copied"
    with pytest.raises(RefusedError, match=sentence):
        choose_place(wanted, manifest, {"/alice": mine})
    with pytest.raises(RefusedError, match=sentence):
        fetch_from_follower._place_of(Sought("model", str(mine), "model"), wanted, manifest, None)
    place = choose_place(wanted, manifest, {}, tmp_path / "hub")
    assert place.result.parent == tmp_path / "data/vllm-spark/models"


def test_a_folder_with_weights_that_are_not_loaded_beside_the_copied_ones(model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "pytorch_model.bin").write_bytes(b"older")
    wanted = wanted_of(model)
    manifest, _ = list_files(wanted)
    place = choose_place(wanted, manifest, {"/alice": mine})
    copy(wanted, place)
    assert wanted.identity_at(mine).difference(wanted.identity) is None
