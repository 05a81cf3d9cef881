"""A follower gets from its leader what it lacks: complete, compared, and only where it may. Real sockets, processes."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.hub import COMMIT, cache_model
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import PeerLostError, RefusedError
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.framing import Kind
from vllm_spark.executor.handshake import leader_search
from vllm_spark.executor.handshake.client import Connector, make_connector
from vllm_spark.executor.handshake.leader_search import Found, LeaderSearch
from vllm_spark.executor.handshake.messages import GROUPS, RPC, Offer, Reason, decode_frame
from vllm_spark.executor.handshake.server import Follower, Listener
from vllm_spark.executor.model_files.comparison import ModelIdentity
from vllm_spark.executor.model_files.hub_cache import hub_place_of
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.executor.model_files.own import copied_place
from vllm_spark.executor.model_sync import staging
from vllm_spark.executor.model_sync.fetch_from_leader import fetch_from_leader
from vllm_spark.executor.model_sync.manifest import CopiedFile
from vllm_spark.executor.model_sync.sender import ModelSender

from .test_channel import LIMIT, SECRET, wait_for
from .test_leader_search import messages

MIB = 1 << 20
AT_ALICES = "/alice/tiny"
"""What the leader's user calls the model: a path that the follower's machine does not have."""

COPIED = {
    *("config.json", "generation_config.json", "modules.json", "2_Dense/config.json"),
    *("2_Dense/model.safetensors", "model-1.safetensors", "model-2.safetensors"),
}


@pytest.fixture(autouse=True)
def bob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """The follower's user, who has a home of his own, and copies in small ranges."""
    caplog.set_level(logging.INFO, "vllm_spark")
    monkeypatch.setattr(leader_search, "_FIRST_PAUSE", 0.05)
    monkeypatch.setattr(leader_search, "_LONGEST_PAUSE", 0.2)
    monkeypatch.setattr(staging, "RANGE_BYTES", MIB)
    return home_of(tmp_path / "bob", monkeypatch)


def home_of(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes this process that of a user with this empty home, who is offline and has the secret."""
    from huggingface_hub import constants

    home.mkdir()
    monkeypatch.setenv("VLLMSPARK_SECRET", SECRET.decode())
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The leader's."""
    return model_at(tmp_path / "alice" / "tiny")


def model_at(folder: Path, seed: bytes = b"a") -> Path:
    (folder / "2_Dense").mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "generation_config.json").write_text("{}")
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    (folder / "2_Dense" / "config.json").write_text('{"dense": 1}')
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"")
    (folder / "model-1.safetensors").write_bytes(seed * (3 * MIB + 17))
    (folder / "model-2.safetensors").write_bytes(seed * 100)
    (folder / "notes.md").write_text("not needed")
    return folder


def as_hub(model: Path, cache: Path, repository: str = "somebody/tiny", commit: str = COMMIT) -> Path:
    """Puts a model into a hub's cache as huggingface_hub does: blobs, and links to them in the snapshot."""
    snapshot = cache_model(model, cache, repository, commit)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(exist_ok=True)
    for number, path in enumerate(sorted(each for each in snapshot.rglob("*") if each.is_file())):
        blob = blobs / f"{number:02d}{commit[2:]}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    return snapshot


class Leader:
    """A leader that offers the model in `place`, and what becomes of its wait for a follower.

    Args:
        place: where it is.
        name: what its user calls it.
        sends: `--spark-model-sync`.
    """

    def __init__(self, place: Path, name: str = AT_ALICES, *, sends: bool = True, timeout: float = 60.0) -> None:
        hub = hub_place_of(place)
        origin = "path" if hub is None else "hub"
        here = LoadedFiles("model", name, str(place), "model", ModelIdentity.of(place), origin, hub)  # type: ignore[arg-type]
        self.wanted = dataclasses.replace(here, place=AT_ALICES)
        """As the follower gets it: it cannot look at the leader's path."""
        self.sender = ModelSender()
        self.sender.offer([here])
        serve = self.sender.serve
        self.listener = Listener("127.0.0.1", 0, tls_context(SECRET, "leader"), LIMIT, serve_copy=serve)
        self.port = int(self.listener.endpoint.rpartition(":")[2])
        offer = Offer(name, [self.wanted], 5.0, sends_files=sends)
        self.accepted: Future[Follower] = Future()

        def wait() -> None:
            try:
                self.accepted.set_result(self.listener.wait_for_follower(offer, timeout, self.sender.changed))
            except Exception as error:
                self.accepted.set_exception(error)

        threading.Thread(target=wait, daemon=True).start()  # a follower that refuses leaves it waiting

    def close(self) -> None:
        self.listener.close()
        self.sender.close()


@pytest.fixture
def leaders() -> Iterator[list[Leader]]:
    made: list[Leader] = []
    yield made
    for each in made:
        each.close()


def follow(leader: Leader, mapping: str | None = None, *, once: bool = True) -> Found:
    """What a follower does until the leader has all its connections."""
    config = SparkConfig(port=leader.port, model_path=mapping)

    def connect() -> Connector:
        return make_connector(config, "127.0.0.1", leader.port)

    found = LeaderSearch(config, connect, lambda *given: None, lambda environment: None, once=once).find()
    for connection in (RPC, GROUPS):
        assert found.connector.connect(connection) is not None
    leader.accepted.result(30)
    return found


def place_of(found: Found) -> Path:
    (place,) = set(found.own.values())
    return place


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same(copy: Path, model: Path) -> None:
    """All files that a worker may read are there, byte by byte, and no others."""
    original = contents(model)
    assert contents(copy) == {name: original[name] for name in COPIED}


def assert_no_leftovers(home: Path) -> None:
    assert [path for path in home.rglob("*") if "vllm-spark-copy" in path.name] == []


def test_a_model_in_a_folder(model: Path, bob: Path, leaders: list[Leader], caplog: pytest.LogCaptureFixture) -> None:
    """It goes to a folder that its content names; the next time it is found there."""
    leaders.append(leader := Leader(model))
    place = place_of(follow(leader))
    assert place.parent == bob / "data/vllm-spark/models"
    assert place == copied_place(leader.wanted)
    assert_same(place, model)
    assert_no_leftovers(bob)
    assert messages(caplog, r"^Copying the model /alice/tiny to this machine: 3\.1 MB in 7 files\.$")
    sent = leader.sender.sent
    assert sent == sum(len(content) for content in contents(place).values())
    leaders.append(again := Leader(model))
    assert place_of(follow(again)) == place
    assert again.sender.sent == 0


def test_off_refuses_with_the_command(model: Path, bob: Path, leaders: list[Leader]) -> None:
    leaders.append(leader := Leader(model, sends=False))
    with pytest.raises(RefusedError, match=rf"there is no model in {AT_ALICES} on .*; copy the leader's there"):
        follow(leader)
    assert leader.sender.sent == 0
    assert contents(bob) == {}


def test_a_model_of_the_hub(model: Path, bob: Path, tmp_path: Path, leaders: list[Leader]) -> None:
    """Blobs, links and branch are as a download leaves them."""
    snapshot = as_hub(model, tmp_path / "alice/hub")
    leaders.append(leader := Leader(snapshot, "somebody/tiny"))
    place = place_of(follow(leader))
    assert place == bob / f"hub/models--somebody--tiny/snapshots/{COMMIT}"
    assert_same(place, model)
    assert_no_leftovers(bob)
    for name in COPIED:
        assert os.readlink(place / name) == os.readlink(snapshot / name)
    assert (place.parents[1] / "refs/main").read_text() == COMMIT


def test_a_tag_with_other_characters_is_left_out(model: Path, bob: Path, tmp_path: Path, leaders: list[Leader]) -> None:
    """It may be any name of git's, and must not keep a model from being copied."""
    snapshot = as_hub(model, tmp_path / "alice/hub")
    (snapshot.parents[1] / "refs" / "v1+cu130").write_text(COMMIT)
    leaders.append(leader := Leader(snapshot, "somebody/tiny"))
    place = place_of(follow(leader))
    assert_same(place, model)
    assert [ref.name for ref in (place.parents[1] / "refs").iterdir()] == ["main"]


def test_two_versions_side_by_side(model: Path, bob: Path, tmp_path: Path, leaders: list[Leader]) -> None:
    """Of a repository, where files of the same content are not sent again; and of a folder."""
    other = COMMIT[::-1]
    first = as_hub(model, tmp_path / "alice/hub")
    leaders.append(leader := Leader(first, "somebody/tiny"))
    before = place_of(follow(leader))
    (model / "model-2.safetensors").write_bytes(b"new" * 100)
    second = cache_model(model, tmp_path / "alice/hub", "somebody/tiny", other)
    big = second / "model-1.safetensors"
    big.unlink()
    big.symlink_to(os.readlink(first / "model-1.safetensors"))
    leaders.append(leader := Leader(second, "somebody/tiny"))
    after = place_of(follow(leader))
    assert leader.sender.sent < MIB
    assert (before.name, after.name) == (COMMIT, other)
    assert_same(after, model)
    assert (before / "model-2.safetensors").read_bytes() == b"a" * 100
    assert (before.parents[1] / "refs/main").read_text() == COMMIT

    leaders.append(leader := Leader(model))
    one = place_of(follow(leader))
    (model / "model-2.safetensors").write_bytes(b"newer")
    leaders.append(leader := Leader(model))
    two = place_of(follow(leader))
    assert one != two
    assert (one / "model-2.safetensors").read_bytes() == b"new" * 100
    assert_same(two, model)


def test_a_commit_that_is_here_in_part_is_completed(
    model: Path, bob: Path, tmp_path: Path, leaders: list[Leader]
) -> None:
    """As vLLM leaves it that has read a model's configuration alone."""
    snapshot = as_hub(model, tmp_path / "alice/hub")
    mine = bob / f"hub/models--somebody--tiny/snapshots/{COMMIT}"
    mine.mkdir(parents=True)
    shutil.copy(model / "config.json", mine)
    before = (mine / "config.json").stat()
    leaders.append(leader := Leader(snapshot, "somebody/tiny"))
    assert place_of(follow(leader)) == mine
    assert_same(mine, model)
    after = (mine / "config.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_damaged_commit_is_not_replaced(model: Path, bob: Path, tmp_path: Path, leaders: list[Leader]) -> None:
    snapshot = as_hub(model, tmp_path / "alice/hub")
    mine = as_hub(model, bob / "hub")
    (mine / "model-2.safetensors").resolve().write_bytes(b"b" * 100)
    leaders.append(leader := Leader(snapshot, "somebody/tiny"))
    place = place_of(follow(leader))
    assert place.parent == bob / "data/vllm-spark/models"
    assert_same(place, model)
    assert (mine / "model-2.safetensors").read_bytes() == b"b" * 100


@pytest.mark.parametrize("by", ["path", "repository"])
def test_a_mapped_folder(model: Path, bob: Path, tmp_path: Path, leaders: list[Leader], by: str) -> None:
    place = model if by == "path" else as_hub(model, tmp_path / "alice/hub")
    name = AT_ALICES if by == "path" else "somebody/tiny"
    leaders.append(leader := Leader(place, name))
    mine = bob / "disk" / "mine"
    mapping = f"other=/x,{name}={mine}"
    with pytest.raises(RefusedError, match=rf"cannot be made, because there is no {mine.parent} on"):
        follow(leader, mapping)
    mine.parent.mkdir()
    assert place_of(follow(leader, mapping)) == mine
    assert_same(mine, model)
    assert_no_leftovers(bob)


def test_a_mapped_folder_that_is_there(model: Path, bob: Path, leaders: list[Leader]) -> None:
    """It is completed; a small file that nobody compares may be its owner's. Another version is not touched."""
    mine = bob / "mine"
    mine.mkdir()
    shutil.copy(model / "model-1.safetensors", mine)
    (mine / "generation_config.json").write_text('{"of": "bob"}')
    leaders.append(leader := Leader(model))
    assert place_of(follow(leader, f"{AT_ALICES}={mine}")) == mine
    assert leader.sender.sent < MIB
    assert contents(mine)["generation_config.json"] == b'{"of": "bob"}'
    (mine / "model-2.safetensors").write_bytes(b"b" * 100)
    before = contents(mine)
    leaders.append(leader := Leader(model))
    sentence = rf"{mine}/model-2.safetensors on .* has other content .*, and is not replaced; move {mine} away"
    with pytest.raises(RefusedError, match=sentence):
        follow(leader, f"{AT_ALICES}={mine}")
    assert contents(mine) == before


def test_a_file_that_changes_while_it_is_copied(
    model: Path, bob: Path, leaders: list[Leader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides get the sentence; the leader ends, and with the new content only what is new is copied."""
    leaders.append(leader := Leader(model))
    changed = model / "model-2.safetensors"
    send = ModelSender._send_range

    def change(self: ModelSender, *given: object) -> None:
        changed.write_bytes(b"changed" * 10)
        send(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ModelSender, "_send_range", change)
        with pytest.raises(RefusedError, match=rf"{changed} on {host_name()} was changed after it was compared"):
            follow(leader)
        with pytest.raises(RefusedError, match=rf"{changed} on {host_name()} was changed after it was compared"):
            leader.accepted.result(30)
    assert not any(path.name == "config.json" for path in bob.rglob("*"))
    leaders.append(leader := Leader(model))
    assert_same(place_of(follow(leader)), model)
    assert_no_leftovers(bob)


def test_what_arrived_before_is_not_copied_again_and_is_looked_at(
    model: Path, bob: Path, leaders: list[Leader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt ends after two ranges; a byte of one of them is damaged before the second attempt."""
    leaders.append(leader := Leader(model))
    record, recorded = staging.Staging.record, []

    def limited(self: staging.Staging, file: CopiedFile, offset: int, checksum: str) -> None:
        record(self, file, offset, checksum)
        if file.name == "model-1.safetensors":
            recorded.append(self.data(file))
        if len(recorded) == 2:
            raise RefusedError("enough for now")

    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "record", limited)
        with pytest.raises(RefusedError, match="enough for now"):
            follow(leader)
    before = leader.sender.sent
    data = recorded[0]
    with data.open("r+b") as content:
        content.seek(MIB + 5)
        content.write(b"X")
    with data.with_suffix(".ranges").open("ab") as ranges:
        ranges.write(b"2097152 0123")  # a process was killed in this line
    assert_same(place_of(follow(leader)), model)
    assert leader.sender.sent - before < 3 * MIB  # the damaged range and the last ones, and not the first
    assert leader.sender.sent - before > 2 * MIB


def test_a_disk_without_room(model: Path, bob: Path, leaders: list[Leader], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first byte."""
    from vllm_spark.executor.model_sync import receiver

    monkeypatch.setattr(receiver, "free_bytes", lambda place: 5 * MIB)
    leaders.append(leader := Leader(model))
    with pytest.raises(RefusedError, match=r"the model /alice/tiny needs 19\.9 MB more on .*, and 5\.2 MB are free at"):
        follow(leader)
    assert leader.sender.sent == 0


def test_a_leader_that_waits_is_told_of_the_copy(
    model: Path, leaders: list[Leader], caplog: pytest.LogCaptureFixture
) -> None:
    leaders.append(leader := Leader(model))
    follow(leader)
    wait_for(lambda: messages(caplog, r"The follower on .* is copying the model /alice/tiny"), "the leader logs it")


def test_the_time_of_a_copy_does_not_count_as_waiting(
    model: Path, leaders: list[Leader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A follower that fails after an hour of copying may connect again."""
    from vllm_spark.executor.handshake import server

    passed = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed[0], sleep=time.sleep)
    monkeypatch.setattr(server, "time", clock)
    leaders.append(leader := Leader(model))

    def slowly(*given: Any) -> Path:
        if passed[0] == 0.0:
            passed[0] = 3600.0
            raise RefusedError("the disk is full")
        return fetch_from_leader(*given)

    monkeypatch.setattr(leader_search, "fetch_from_leader", slowly)
    follow(leader, once=False)


def test_files_that_change_before_the_follower_is_taken(
    model: Path, leaders: list[Leader], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It gets the reason, and all its connections are closed; they are looked at once."""
    looked: list[ModelSender] = []

    def changed(self: ModelSender) -> RefusedError:
        looked.append(self)
        return RefusedError("config.json was changed after it was compared")

    monkeypatch.setattr(ModelSender, "changed", changed)
    leaders.append(leader := Leader(model))
    config = SparkConfig(port=leader.port)
    connector = make_connector(config, "127.0.0.1", leader.port)
    found = LeaderSearch(config, lambda: connector, lambda *given: None, lambda environment: None, once=True).find()
    others = [connector.connect(connection) for connection in (RPC, GROUPS)]
    with pytest.raises(RefusedError, match="was changed after it was compared"):
        leader.accepted.result(30)
    reason = decode_frame(found.control.expect(Kind.FAILURE, timeout=20), Reason)
    assert reason.sentence == "config.json was changed after it was compared"
    for connection in (found.control, *others):
        assert connection is not None
        with pytest.raises(PeerLostError):
            connection.receive(timeout=20)
        connection.close()
    assert len(looked) == 1
    assert not messages(caplog, "starts again")
