"""The folder of vLLM's sockets goes away: at the owner's end, after its death, and never while it lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_spark.backend.ipc_folder import PREFIX, VARIABLE, check_socket_folder, make_socket_folder
from vllm_spark.errors import ConfigurationError

OWNER = """
import os, sys
from vllm_spark.backend.ipc_folder import make_socket_folder
make_socket_folder()
print(os.environ.get("VLLM_RPC_BASE_PATH"), flush=True)
sys.stdin.read()
"""

Owner = subprocess.Popen[str]


@pytest.fixture
def folders() -> Iterator[Path]:
    """A temporary folder with a short path, as machines have it; pytest's is too long for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def start(folders: Path) -> Iterator[Callable[..., Owner]]:
    """Starts a process that makes a folder in a temporary one and lives until its input ends."""
    owners: list[Owner] = []

    def start(code: str = OWNER, **environment: str) -> Owner:
        inherited = {name: value for name, value in os.environ.items() if name != VARIABLE}
        owners.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=inherited | {"TMPDIR": str(folders)} | environment,
            )
        )
        return owners[-1]

    yield start
    for owner in owners:
        owner.kill()
        owner.communicate()


def folder_of(owner: Owner) -> Path:
    assert owner.stdout is not None
    return Path(owner.stdout.readline().strip())


def test_it_goes_with_its_owner(start: Callable[..., Owner], folders: Path) -> None:
    owner = start()
    folder = folder_of(owner)
    assert folder.parent == folders
    assert folder.stat().st_mode & 0o077 == 0
    (folder / "socket").touch()
    owner.communicate()
    assert owner.returncode == 0
    assert list(folders.iterdir()) == []


def test_it_goes_before_the_server_exits(start: Callable[..., Owner], folders: Path) -> None:
    """A second signal during the exit, or a supervisor that is out of patience, ends the process at once."""
    code = (
        "import os, signal\n"
        "from vllm_spark.backend.ipc_folder import make_socket_folder\n"
        "from vllm_spark.entrypoints.serve import exit_with_sentence\n"
        "from vllm_spark.errors import SparkError\n"
        "try:\n"
        "    with exit_with_sentence(None):\n"
        "        make_socket_folder()\n"
        "        print(os.environ['VLLM_RPC_BASE_PATH'], flush=True)\n"
        "        raise SparkError('the engine was killed')\n"
        "except SystemExit:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    owner = start(code)
    assert owner.stdout is not None
    assert owner.stdout.readline().strip().startswith(f"{folders}/{PREFIX}")
    assert owner.wait(60) == -signal.SIGKILL
    assert list(folders.iterdir()) == []


def test_the_next_one_removes_what_a_killed_owner_left(start: Callable[..., Owner], folders: Path) -> None:
    killed, alive = start(), start()
    left, kept = folder_of(killed), folder_of(alive)
    (left / "socket").touch()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert left.is_dir()
    mine = folder_of(start())
    assert {path for path in folders.iterdir() if path.name.startswith(PREFIX)} == {kept, mine}


def test_a_folder_whose_owner_died_newborn_goes_when_it_is_old(start: Callable[..., Owner], folders: Path) -> None:
    born, old, not_empty = (folders / f"{PREFIX}{name}" for name in ("born", "old", "not-empty"))
    for folder in (born, old, not_empty):
        folder.mkdir()
    (not_empty / "theirs").touch()
    for folder in (old, not_empty):
        os.utime(folder, (0, 0))
    mine = folder_of(start())
    assert set(folders.iterdir()) == {born, not_empty, mine}


def test_a_forked_process_leaves_it_alone(start: Callable[..., Owner]) -> None:
    fork = OWNER.replace(
        "sys.stdin", "child = os.fork()\nif not child: sys.exit()\nos.waitpid(child, 0)\nprint()\nsys.stdin"
    )
    owner = start(fork)
    folder = folder_of(owner)
    assert owner.stdout is not None
    # The child prints what it had in its buffer at its end, if anything.
    owner.stdout.readline()
    assert folder.is_dir()


def test_the_engine_removes_it_after_its_owners_death(start: Callable[..., Owner]) -> None:
    killed = start()
    folder = folder_of(killed)
    killed.kill()
    killed.wait()
    code = "from vllm_spark.backend.ipc_folder import remove_socket_folder as remove; remove()"
    start(code, **{VARIABLE: str(folder)}).communicate()
    assert not folder.exists()


def test_a_users_own_folder_stays(start: Callable[..., Owner], folders: Path) -> None:
    theirs = folders / "theirs"
    theirs.mkdir()
    owner = start(**{VARIABLE: str(theirs)})
    assert folder_of(owner) == theirs
    owner.communicate()
    code = "from vllm_spark.backend.ipc_folder import remove_socket_folder as remove; remove()"
    start(code, **{VARIABLE: str(theirs)}).communicate()
    assert list(folders.iterdir()) == [theirs]


def test_an_empty_variable_is_as_none(start: Callable[..., Owner], folders: Path) -> None:
    assert folder_of(start(**{VARIABLE: ""})).parent == folders


def test_paths_stay_short_enough_for_sockets(start: Callable[..., Owner], folders: Path) -> None:
    deep = folders / ("x" * 80)
    deep.mkdir()
    owner = start(TMPDIR=str(deep))
    assert folder_of(owner) == Path("None")
    assert list(deep.iterdir()) == []


def test_the_log_says_that_a_path_is_too_long(
    folders: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deep = folders / ("x" * 80)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.delenv(VARIABLE, raising=False)
    make_socket_folder()
    assert VARIABLE not in os.environ
    (message,) = caplog.messages
    assert f"and remain after a kill: the path {deep}/" in message
    assert message.endswith("set TMPDIR to a shorter one.")


@pytest.mark.parametrize("variable", ["TMPDIR", VARIABLE])
def test_a_folder_that_is_too_long_for_any_socket_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would end with ZeroMQ's traceback: an address holds 107 bytes, of which 37 are the socket's name."""
    for name, folder in ((VARIABLE, ""), ("TMPDIR", "/tmp")):
        monkeypatch.setenv(name, folder)
    monkeypatch.setattr(tempfile, "tempdir", None)
    check_socket_folder()
    longest = "/tmp/" + "x" * 65
    monkeypatch.setattr(tempfile, "tempdir", longest if variable == "TMPDIR" else None)
    if variable == VARIABLE:
        monkeypatch.setenv(VARIABLE, longest)
    check_socket_folder()
    monkeypatch.setattr(tempfile, "tempdir", f"{longest}x" if variable == "TMPDIR" else None)
    if variable == VARIABLE:
        monkeypatch.setenv(VARIABLE, f"{longest}x")
    with pytest.raises(ConfigurationError, match=rf"{longest}x, has a path of 71 bytes.*; set {variable} to a shorter"):
        check_socket_folder()
