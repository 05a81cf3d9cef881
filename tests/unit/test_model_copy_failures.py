"""What a user is told of a copy that fails, and what does not make it fail."""

from __future__ import annotations

import errno
import os
import queue
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from vllm_spark.errors import RefusedError
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.channel.framing import Connection, ConnectionClosedError
from vllm_spark.executor.handshake.messages import CopyState, Sought
from vllm_spark.executor.model_files.comparison import file_digest
from vllm_spark.executor.model_sync import fetch_from_follower, receiver
from vllm_spark.executor.model_sync.destination import FolderPlace, Place, choose_place
from vllm_spark.executor.model_sync.manifest import list_files
from vllm_spark.executor.model_sync.receiver import ProcessStream, ThreadStream, ask_for_list, copy_files
from vllm_spark.executor.model_sync.staging import Staging
from vllm_spark.executor.model_sync.stream import StreamSettings

from .test_model_copy_limits import (
    connection_of_two,
    ends,
    model,
    receive,
    sender_of,
    serving,
    shown_on_a_terminal,
    wanted_of,
)

__all__ = ["ends", "model"]


def test_a_log_beside_the_weights_may_grow(model: Path, tmp_path: Path, ends: tuple[Connection, Connection]) -> None:
    """What was listed of it is copied; the next copy gets what it is then."""
    log = model / "log.txt"
    log.write_text("first\n")
    wanted = wanted_of(model)
    sender = sender_of(wanted)
    with serving(sender, ends) as far:
        manifest = ask_for_list(far, wanted)
        log.write_text("first\nsecond\n")
        receive(wanted, manifest, FolderPlace(tmp_path / "bob", wanted), far)
    assert (tmp_path / "bob/log.txt").read_text() == "first\n"
    assert sender.changed() is None
    log.write_text("new")
    with serving(sender, connection_of_two()) as far:
        sizes = {file.name: file.size for file in ask_for_list(far, wanted).files}
    assert sizes["log.txt"] == 3


def test_a_large_file_beside_the_weights_is_not_copied(model: Path) -> None:
    for name, size in (("small.txt", 16 << 20), ("large.txt", (16 << 20) + 1)):
        with (model / name).open("wb") as file:
            file.truncate(size)
    names = {file.name for file in list_files(wanted_of(model))[0].files}
    assert names == {"config.json", "model.safetensors", "small.txt"}


def test_what_is_offered_again_is_listed_again(model: Path, ends: tuple[Connection, Connection]) -> None:
    wanted = wanted_of(model)
    sender = sender_of(wanted)
    with serving(sender, ends) as far:
        ask_for_list(far, wanted)
    os.utime(model / "model.safetensors", (1, 1))
    assert "was changed after it was compared" in str(sender.changed())
    sender.offer([wanted])
    assert sender.changed() is None


WRITE = {
    "follower": "let this user write there, or give another folder: vllm-spark join --model-path /alice=FOLDER",
    "leader": "let this user write there, or start vllm serve with another path, or with --download-dir",
}
ROOM = {"follower": "make room there, and the copy continues", "leader": "make room there, start this command again"}


def place_of(role: str, model: Path, tmp_path: Path) -> Place:
    wanted, bob = wanted_of(model), tmp_path / "bob"
    manifest, _ = list_files(wanted)
    if role == "leader":
        return fetch_from_follower._place_of(Sought("model", str(bob), "model"), wanted, manifest, None)
    return choose_place(wanted, manifest, {"/alice": bob})


@pytest.mark.parametrize("role", ["follower", "leader"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "(No space left on device)"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x"), "(Disk quota exceeded: /x)"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "(Permission denied: /x)"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "(Read-only file system: /x)"),
        (OSError(errno.EIO, "Input/output error"), "(Input/output error)"),
    ],
    ids=["full", "quota", "permission", "read-only", "damaged"],
)
def test_an_error_of_this_machines_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, error: OSError, reason: str
) -> None:
    """The remedy fits the cause, and the machine."""
    place = place_of(role, model, tmp_path)

    def fail(*given: object) -> None:
        raise error

    monkeypatch.setattr(Staging, "allocated", fail)
    with pytest.raises(RefusedError) as caught:
        copy_files(place.wanted, list_files(place.wanted)[0], {}, lambda *given: [], lambda state: None, place=place)
    sentence = str(caught.value)
    assert reason in sentence
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        assert sentence.startswith(f"the disk of {tmp_path} on {host_name()} is full")
        assert ROOM[role] in sentence
    assert (WRITE[role] in sentence) == (error.errno in (errno.EACCES, errno.EROFS))
    assert ("look at the disk (dmesg)" in sentence) == (error.errno == errno.EIO)
    assert "None" not in sentence


@pytest.mark.parametrize("role", ["follower", "leader"])
def test_the_remedy_is_one_of_this_machine(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """Of another version in its place, of a disk without room, of a folder that cannot be made, of a damaged file."""
    place = place_of(role, model, tmp_path)
    wanted, (manifest, _) = place.wanted, list_files(place.wanted)
    sentences = []

    def attempt(made: Place) -> None:
        with pytest.raises(RefusedError) as caught:
            copy_files(wanted, manifest, {}, lambda *given: [], lambda state: None, place=made)
        sentences.append(str(caught.value))

    with monkeypatch.context() as patch:
        patch.setattr(receiver, "free_bytes", lambda place: 0)
        attempt(place)
    (tmp_path / "file").write_text("")
    place.staging, staging = tmp_path / "file" / "staging", place.staging
    attempt(place)
    place.staging = staging
    (tmp_path / "bob").mkdir()
    (tmp_path / "bob/config.json").write_text("[]")
    with pytest.raises(RefusedError) as caught:
        place_of(role, model, tmp_path)
    sentences.append(str(caught.value))
    assert ["vllm-spark join --model-path" in each for each in sentences] == [role == "follower"] * 3, sentences
    assert ["--download-dir" in each for each in sentences] == [role == "leader"] * 3, sentences


def test_a_stream_whose_start_fails_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            started.append(self)

    def fail(settings: object) -> bytes:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(receiver, "to_json", fail)
    with Staging(tmp_path / "s") as staging, pytest.raises(Exception, match="at its start; see dmesg"):
        ProcessStream(StreamSettings("{}", "127.0.0.1", 1, "s"), staging.lock)
    (process,) = started
    assert process.returncode is not None


@pytest.mark.parametrize("streams", [1, 2])
def test_streams_that_cannot_be_started_leave_nothing_open(monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
    """Neither pipes nor connections, of those after them too."""
    pairs = [connection_of_two() for _ in range(streams + 1)]
    (control, follower), *copies = pairs
    arrived: queue.SimpleQueue[Connection] = queue.SimpleQueue()
    for end, _ in copies:
        arrived.put(end)

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start") as caught:
            fetch_from_follower._Copier(control, arrived, None)._open_streams(streams, 0)
    assert len(os.listdir("/proc/self/fd")) <= descriptors - streams, caught.traceback
    for _, far in copies:
        with pytest.raises(ConnectionClosedError, match="closed the connection"):
            far.receive(timeout=20)
        far.close()
    control.close()
    follower.close()


def test_a_state_is_reported_while_the_last_file_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: tuple[Connection, Connection]
) -> None:
    """The other machine counts silence as a loss, and a slow disk may take minutes."""
    wanted = wanted_of(model)
    manifest, _ = list_files(wanted)
    monkeypatch.setattr(receiver, "_REPORT_INTERVAL", 0.02)
    complete, reported, seen = threading.Event(), threading.Event(), []

    def slow_digest(path: Path) -> str:
        complete.set()
        seen.append(reported.wait(5))
        return file_digest(path)

    after: list[CopyState] = []

    def report(state: CopyState) -> None:
        if state.done == manifest.size and complete.is_set():
            after.append(state)
            if len(after) == 4:
                reported.set()

    monkeypatch.setattr(receiver, "file_digest", slow_digest)
    with serving(sender_of(wanted), ends) as far:
        place = FolderPlace(tmp_path / "bob", wanted)
        copy_files(wanted, manifest, {}, lambda *given: [ThreadStream(far)], report, place=place)
    assert seen == [True, True]


def test_a_killed_process_leaves_the_cursor(tmp_path: Path) -> None:
    program = (
        "import os\n"
        "from vllm_spark.executor.handshake.messages import CopyState\n"
        "from vllm_spark.executor.model_sync.progress import CopyDisplay\n"
        "CopyDisplay('Copying from the leader').show(CopyState('model x', 1, 2))\n"
        "os._exit(0)\n"
    )
    shown = shown_on_a_terminal(program, 80)
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0
