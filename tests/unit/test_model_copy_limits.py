"""A follower writes nothing outside of its places, whatever a leader sends, and no more than was announced."""

from __future__ import annotations

import contextlib
import os
import pty
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_spark.errors import PeerLostError, RefusedError
from vllm_spark.executor.channel.framing import ChannelError, Connection, Kind
from vllm_spark.executor.handshake.messages import CopyList, CopyRange, CopyState, Reason, decode_frame
from vllm_spark.executor.model_files.comparison import ModelIdentity
from vllm_spark.executor.model_files.hub_cache import HubPlace
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.executor.model_files.own import content_key
from vllm_spark.executor.model_sync.destination import FolderPlace, Place, SnapshotPlace, choose_place
from vllm_spark.executor.model_sync.manifest import CopiedFile, Manifest, check_manifest, file_below, list_files
from vllm_spark.executor.model_sync.progress import CopyDisplay, RateMeter, duration_text, size_text, state_text
from vllm_spark.executor.model_sync.receiver import ThreadStream, ask_for_list, copy_files, stream_count
from vllm_spark.executor.model_sync.sender import ModelSender
from vllm_spark.executor.model_sync.staging import Staging, ranges_of
from vllm_spark.records import to_json

from .test_channel import LIMIT, connected

DIGEST = "0" * 32


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "alice"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    return folder


def wanted_of(place: Path, hub: HubPlace | None = None) -> LoadedFiles:
    return LoadedFiles("model", "/alice", str(place), "model", ModelIdentity.of(place), "path", hub)


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    """A copy connection: the sender's end and the receiver's."""
    pair = connection_of_two()
    yield pair
    for end in pair:
        end.close()


def connection_of_two() -> tuple[Connection, Connection]:
    left, right = connected()
    return Connection(left, "the follower", LIMIT), Connection(right, "the leader", LIMIT)


def sender_of(wanted: LoadedFiles) -> ModelSender:
    sender = ModelSender()
    sender.offer([wanted])
    return sender


@contextmanager
def serving(sender: ModelSender, ends: tuple[Connection, Connection]) -> Iterator[Connection]:
    """It answers at the first of `ends` in a thread; yields the other one, which is closed when the context is left."""
    near, far = ends
    with ThreadPoolExecutor() as pool:
        pool.submit(sender.serve, near)
        try:
            yield far
        finally:
            far.close()


def copy(wanted: LoadedFiles, place: Place, manifest: Manifest | None = None) -> int:
    """Copies over one connection from an honest sender; returns the bytes that it has sent."""
    sender = sender_of(wanted)
    with serving(sender, connection_of_two()) as far:
        receive(wanted, manifest or list_files(wanted)[0], place, far)
    return sender.sent


def receive(wanted: LoadedFiles, manifest: Manifest, place: Place, connection: Connection) -> None:
    """Copies over this connection, with one stream in a thread."""
    copy_files(wanted, manifest, {}, lambda *given: [ThreadStream(connection)], lambda state: None, place=place)


NAMES = {
    "../escaped": "leads out of the model's folder",
    "a/../../escaped": "leads out of the model's folder",
    "..": "leads out of the model's folder",
    ".": "leads out of the model's folder",
    "a//b": "leads out of the model's folder",
    "a/": "leads out of the model's folder",
    "/etc/cron.d/job": "not a relative name",
    "": "not a relative name",
    "a\\..\\b": "not a relative name",
    "a\nb": "not a relative name",
    "a\0b": "not a relative name",
    "\udcff": "not a relative name",
    ".ssh/authorized_keys": "hidden",
    "a/.b": "hidden",
    "a/b/c/d/e/f": "in more than 4 folders",
    "x" * 201: "with more than 200 bytes",
}


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_is_not_one_below_a_folder(model: Path, name: str) -> None:
    wanted = wanted_of(model)
    honest, _ = list_files(wanted)
    check_manifest(honest, wanted)
    with pytest.raises(RefusedError, match=f"has a file named .*{NAMES[name]}") as caught:
        check_manifest(Manifest([*honest.files, CopiedFile(name, 1, DIGEST)]), wanted)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([CopiedFile("config.json", 1, DIGEST)], "has the file 'config.json' twice"),
        ([CopiedFile("a", 1, DIGEST), CopiedFile("a/b", 1, DIGEST)], "has 'a' both as a file and as a folder"),
        ([CopiedFile("a", -1, DIGEST)], "has a file of -1 bytes, 'a'"),
        ([CopiedFile("a", 1, "../../x")], "has a digest of 'a' that is not one"),
        ([CopiedFile("a", 1, DIGEST, "../../../x")], "has a digest of 'a' that is not one"),
        ([CopiedFile(f"{number}", 1, DIGEST) for number in range(20_000)], "has 20002 files, more than 20000"),
    ],
    ids=["twice", "file and folder", "size", "digest", "blob", "many"],
)
def test_a_list_that_is_not_valid(model: Path, more: list[CopiedFile], sentence: str) -> None:
    wanted = wanted_of(model)
    honest, _ = list_files(wanted)
    with pytest.raises(RefusedError, match=sentence):
        check_manifest(Manifest([*honest.files, *more]), wanted)


def test_a_list_without_what_was_compared(model: Path) -> None:
    wanted = wanted_of(model)
    honest, _ = list_files(wanted)
    with pytest.raises(RefusedError, match=r"has no file 'config.json' with the content that was compared"):
        check_manifest(Manifest(honest.files[1:]), wanted)
    for ref in ("../main", "/main", "", "a/b"):
        with pytest.raises(RefusedError, match="has a branch named"):
            check_manifest(Manifest(honest.files, [ref]), wanted)


@pytest.mark.parametrize(
    ("repository", "commit", "inside"),
    [
        ("../../etc", "0" * 40, ""),
        ("..", "0" * 40, ""),
        ("a/b/c", "0" * 40, ""),
        ("somebody/tiny", "../../../etc", ""),
        ("somebody/tiny", "main", ""),
        ("somebody/tiny", "0" * 40, "../../x"),
        ("somebody/tiny", "0" * 40, "/etc"),
    ],
)
def test_a_place_in_the_hub_that_is_not_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: str, commit: str, inside: str
) -> None:
    """The folder of copied models is used in its place."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    wanted = wanted_of(model, HubPlace(repository, commit, inside))
    manifest, _ = list_files(wanted_of(model))
    place = choose_place(wanted, manifest, {}, tmp_path / "hub")
    assert place.result.parent == tmp_path / "data/vllm-spark/models"
    good = HubPlace("somebody/tiny", "0" * 40)
    assert choose_place(wanted_of(model, good), manifest, {}, tmp_path / "hub").result == (
        tmp_path / f"hub/models--somebody--tiny/snapshots/{'0' * 40}"
    )


def test_a_link_in_the_way(model: Path, tmp_path: Path) -> None:
    """One that lies in a folder of the follower's, and leads out of it."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    (folder / "sub").symlink_to(outside)
    with pytest.raises(RefusedError, match=rf"{folder}/sub on .* is a symbolic link, and sub/x is to be written below"):
        file_below(folder, "sub/x", make_folders=True)
    (folder / "file").write_text("")
    with pytest.raises(RefusedError, match="is not a folder"):
        file_below(folder, "file/x")
    (folder / ".vllm-spark-copy").symlink_to(outside)
    with pytest.raises(RefusedError, match="is a symbolic link and must be a folder"):
        Staging(folder / ".vllm-spark-copy")
    assert list(outside.iterdir()) == []


def test_a_link_in_place_of_an_arriving_file(model: Path, tmp_path: Path) -> None:
    """Another user of a shared folder could make one."""
    outside = tmp_path / "outside"
    outside.write_text("precious")
    wanted = wanted_of(model)
    manifest, _ = list_files(wanted)
    place = FolderPlace(tmp_path / "bob", wanted)
    with Staging(place.staging) as staging:
        staging.data(manifest.files[0]).symlink_to(outside)
    with pytest.raises(RefusedError, match="cannot be written"):
        copy(wanted, place)
    assert outside.read_text() == "precious"


def test_over_one_stream_in_a_thread(model: Path, tmp_path: Path) -> None:
    wanted = wanted_of(model)
    place = FolderPlace(tmp_path / "bob", wanted)
    copy(wanted, place)
    assert {path.name: path.read_bytes() for path in place.result.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }


@pytest.mark.parametrize(
    ("lie", "sentence"),
    [
        ("long", "sent 8000 bytes where at most 7000 were asked for"),
        ("end", "sent COPY_END where a part of a file was expected"),
        ("more", "sent COPY_DATA where a part of a file was expected"),
        ("refuse", "the disk burns"),
    ],
)
def test_a_sender_that_sends_something_else(
    model: Path, tmp_path: Path, ends: tuple[Connection, Connection], lie: str, sentence: str
) -> None:
    """More than was asked for, or less. The file never becomes longer than announced."""
    wanted = wanted_of(model)
    manifest, _ = list_files(wanted)
    manifest = Manifest([file for file in manifest.files if file.size == 7000])
    near, far = ends

    def send() -> None:
        decode_frame(near.expect(Kind.COPY_RANGE, timeout=20), CopyRange)
        if lie == "refuse":
            near.send(Kind.FAILURE, to_json(Reason("the disk burns")))
        elif lie != "end":
            near.send_data(Kind.COPY_DATA, memoryview(bytes(8000 if lie == "long" else 7000)), timeout=20)
            near.send_data(Kind.COPY_DATA, memoryview(bytes(10)), timeout=20)
        else:
            near.send(Kind.COPY_END)

    place = FolderPlace(tmp_path / "bob", wanted)
    with ThreadPoolExecutor() as pool:
        pool.submit(send)
        with pytest.raises((RefusedError, PeerLostError), match=sentence):
            receive(wanted, manifest, place, far)
    assert not (tmp_path / "bob").exists()
    assert all(path.stat().st_size <= 7000 for path in place.staging.glob("*.data"))


def test_a_file_that_arrives_damaged(model: Path, tmp_path: Path) -> None:
    """It is dropped, and never put in its place."""
    wanted = wanted_of(model)
    manifest, _ = list_files(wanted)
    place = FolderPlace(tmp_path / "bob", wanted)
    wrong = [file if file.size != 7000 else CopiedFile(file.name, file.size, DIGEST) for file in manifest.files]
    with pytest.raises(RefusedError, match=r"the file model.safetensors .* has another content here"):
        copy(wanted, place, Manifest(wrong))
    assert not (tmp_path / "bob").exists()


def test_two_processes_do_not_copy_into_one_folder(tmp_path: Path) -> None:
    with Staging(tmp_path / "s"), pytest.raises(RefusedError, match=r"another process on .* copies files into"):
        Staging(tmp_path / "s")
    with Staging(tmp_path / "s") as again:
        again.remove()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (CopyRange("0" * 32, 0, 0, 1), "asked for files that were not offered"),
        (CopyRange("", 7, 0, 1), None),
        (CopyRange("", -1, 0, 1), None),
        (CopyRange("", 0, -1, 1), None),
        (CopyRange("", 0, 0, 1 << 40), None),
    ],
    ids=["not offered", "no such file", "negative", "before the start", "after the end"],
)
def test_a_sender_gives_nothing_else(
    model: Path, ends: tuple[Connection, Connection], request_: CopyRange, sentence: str | None
) -> None:
    """Only ranges of files that it offers; what nobody honest asks for ends the connection."""
    wanted = wanted_of(model)
    sender = sender_of(wanted)
    with serving(sender, ends) as far:
        key = request_.key or content_key(wanted)
        far.send(Kind.COPY_RANGE, to_json(CopyRange(key, request_.file, request_.offset, request_.length)))
        if sentence is None:
            with pytest.raises(ChannelError):
                far.receive(timeout=20)
        else:
            assert sentence in decode_frame(far.expect(Kind.FAILURE, timeout=20), Reason).sentence
    assert sender.sent == 0


def test_a_leader_whose_list_is_refused(model: Path, ends: tuple[Connection, Connection]) -> None:
    wanted = wanted_of(model)
    near, far = ends
    with ThreadPoolExecutor() as pool:

        def lie() -> None:
            assert decode_frame(near.expect(Kind.COPY_LIST, timeout=20), CopyList).key == content_key(wanted)
            near.send(Kind.COPY_FILES, to_json(Manifest([CopiedFile("../../x", 1, DIGEST)])))

        pool.submit(lie)
        with pytest.raises(RefusedError, match=r"has a file named '\.\./\.\./x', which leads out"):
            ask_for_list(far, wanted)


def test_ranges_cover_a_file() -> None:
    for size in (0, 1, (32 << 20) - 1, 32 << 20, (32 << 20) + 1, 100 << 20):
        pieces = ranges_of(size)
        assert sum(piece.length for piece in pieces) == size
        assert [piece.offset for piece in pieces[1:]] == [piece.offset + piece.length for piece in pieces[:-1]]


def test_streams_are_as_many_as_there_is_work_for() -> None:
    cores = min(len(os.sched_getaffinity(0)), 8)
    assert stream_count(1) == 1
    assert stream_count(1 << 40) == cores


def test_a_snapshot_in_a_cache_that_is_a_link(model: Path, tmp_path: Path) -> None:
    """The user's own link: caches are often on another disk."""
    disk, cache = tmp_path / "disk", tmp_path / "cache"
    disk.mkdir()
    cache.symlink_to(disk)
    place = SnapshotPlace(HubPlace("somebody/tiny", "0" * 40), wanted_of(model), cache)
    with Staging(place.staging):
        assert (disk / "models--somebody--tiny").is_dir()


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_rate_is_that_of_the_last_seconds() -> None:
    clock = Clock()
    meter = RateMeter(clock)
    assert meter.rate(0) == 0.0
    for second in range(1, 31):
        clock.now = float(second)
        rate = meter.rate(second * 100 if second <= 15 else 1500 + (second - 15) * 10)
        if second == 15:
            assert rate == 100.0
    assert rate == 10.0


def test_a_state_in_words() -> None:
    assert state_text(CopyState("model x", 5_000_000_000, 20_000_000_000, 1.5e9)) == (
        "5.0 GB of 20.0 GB (25 %), 1.5 GB/s, 10 s left"
    )
    assert state_text(CopyState("model x", 0, 0)) == "0 bytes of 0 bytes (0 %)"
    assert (duration_text(59.4), duration_text(61), duration_text(3720)) == ("59 s", "1 min 01 s", "1 h 02 min")
    assert (size_text(999), size_text(1500), size_text(2.5e12)) == ("999 bytes", "1.5 kB", "2.5 TB")


def test_lines_without_a_terminal(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_spark.executor.model_sync import progress

    caplog.set_level("INFO", "vllm_spark")
    monkeypatch.setattr(progress, "_FIRST_LINE", 0.0)
    monkeypatch.setattr(os, "isatty", lambda descriptor: False)
    with CopyDisplay("Copying from the leader") as display:
        for done in range(100):
            display.show(CopyState("model x", done, 100, 10.0))
    assert caplog.messages == ["Copying from the leader: model x: 0 bytes of 100 bytes (0 %), 10 bytes/s, 10 s left."]


def shown_on_a_terminal(program: str, columns: int) -> bytes:
    """Everything that a program of Python writes to a terminal of so many columns; it must end with 0."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm", COLUMNS=str(columns))
        os.execv(sys.executable, [sys.executable, "-c", program])
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while data := os.read(terminal, 1 << 16):
            shown += data
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0, shown
    return shown


@pytest.mark.parametrize(("width", "titled"), [(80, False), (160, True)])
def test_a_bar_on_a_terminal(width: int, titled: bool) -> None:
    """The state is never cut off; there is a title where there is room for it."""
    program = (
        "from vllm_spark.executor.handshake.messages import CopyState\n"
        "from vllm_spark.executor.model_sync.progress import CopyDisplay\n"
        "with CopyDisplay('Copying from the leader') as display:\n"
        "    display.show(CopyState('model Qwen/Qwen3-30B-A3B', 15_200_000_000, 61_100_000_000, 2.9e9))\n"
    )
    shown = shown_on_a_terminal(program, width)
    text = shown.decode()
    assert "15.2 GB of 61.1 GB (24 %), 2.9 GB/s, 16 s left" in text
    assert ("Copying from the leader: model Qwen/Qwen3-30B-A3B" in text) == titled
    assert "━━━━━━━━━━" in text
