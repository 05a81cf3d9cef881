"""The command `vllm-spark`: exit codes and sentences, never a traceback, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vllm_spark import __version__
from vllm_spark.cli import main
from vllm_spark.processes import child
from vllm_spark.processes.managed import Process, clean_environment, program


def spark(tmp_path: Path, *argv: str, **environment: str) -> Process:
    return Process(
        "vllm-spark",
        [program("vllm-spark"), *argv],
        tmp_path / "output.log",
        # Nor with the secret that this machine's user may have.
        clean_environment() | {"XDG_CONFIG_HOME": str(tmp_path)} | environment,
    )


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["joni"], ["joni", "join"]),
        (["join", "--leader", "spark-1"], ["--leader", "spark-1", "not an IP address"]),
        (["join", "--leader", "10.0.0.1"], ["10.0.0.1", "secret-file"]),
        (["join", "--port", "0"], ["--port", "port 0 is invalid: must be a whole number from 1 to 65535"]),
        (["join", "--secret-file", "/no/such/file"], ["/no/such/file", "cannot be read"]),
        (["join", "--wait"], ["--wait"]),
        (["join", "--rails", "mlx5_0,mlx5_0"], ["--rails", "twice"]),
        (["join", "--rails", ""], ["--rails", "it is empty"]),
        (["join", "--leader", "10.0.0.1:29650", "--port", "29651"], ["10.0.0.1:29650", "29651", "leave one of them"]),
        (["bench", "decode", "/no/such"], ["usage: vllm-spark bench decode", "unrecognized arguments: /no/such"]),
        (["bench", "wire", "--listen", "x"], ["usage: vllm-spark bench wire", "unrecognized arguments: x"]),
    ],
)
def test_bad_input(argv: list[str], parts: list[str], tmp_path: Path) -> None:
    process = spark(tmp_path, *argv)
    assert process.wait(60) == 2
    output = process.output()
    assert "Traceback" not in output
    for part in parts:
        assert part in output


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"VLLMSPARK_PORT": "http"}, "VLLMSPARK_PORT http is invalid: must be a whole number from 1 to 65535"),
        ({"VLLMSPARK_PORT": "tcp://10.96.0.7:29650"}, "or set `enableServiceLinks: false` for the pod"),
        ({"VLLMSPARK_PORT": "4711", "SPARK_PORT": "4712"}, "set VLLMSPARK_PORT, and unset SPARK_PORT"),
    ],
    ids=["not a number", "Kubernetes", "old and new"],
)
def test_bad_environment(environment: dict[str, str], sentence: str, tmp_path: Path) -> None:
    process = spark(tmp_path, "join", **environment)
    assert process.wait(60) == 2
    assert sentence in process.output()
    assert "Traceback" not in process.output()


def test_reference_and_patches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    assert "--spark-heartbeat-timeout" in capsys.readouterr().out
    pytest.importorskip("vllm")
    assert main(["patches"]) == 0
    assert "executor-choice" in capsys.readouterr().out


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


@pytest.fixture
def waiting(tmp_path: Path) -> Process:
    """A follower that waits for a leader that never comes."""
    pytest.importorskip("vllm")
    process = spark(tmp_path, "join", "--port", free_port())
    process.wait_for_line("Waiting for a leader at 127.0.0.1", 60)
    assert "In another terminal run: vllm serve MODEL --spark" in process.output()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_waiting_follower_stops_when_asked(waiting: Process, number: signal.Signals) -> None:
    session = waiting.descendants()
    assert session
    os.kill(waiting.pid, number)
    assert waiting.wait(30) == 0
    wait_until_gone(session)
    assert "Traceback" not in waiting.output()


PATIENT = """
import sys
from vllm_spark.entrypoints import join
from vllm_spark.processes import child
from vllm_spark.cli import main
{}
sys.exit(main(["join", "--port", sys.argv[1]]))
"""


def patient(tmp_path: Path, port: str, setting: str) -> Process:
    """`vllm-spark join` with a limit of its own set so high that a test which meets it fails."""
    argv = [sys.executable, "-c", PATIENT.format(setting), port]
    return Process("vllm-spark join", argv, tmp_path / "patient.log", clean_environment())


@pytest.mark.parametrize(
    ("setting", "state"),
    [
        ("join._STOP_GRACE = 600", "Waiting for a leader"),  # the session ends when asked, and is not waited for
        (
            # Sessions that crash are restarted slowly.
            "join._FIRST_DELAY = 600; child.sys.executable = '/bin/false'",
            "The session ended with exit code 1; waiting for the next leader",
        ),
    ],
    ids=["waiting", "pausing"],
)
def test_a_follower_stops_at_once_when_asked(tmp_path: Path, setting: str, state: str) -> None:
    pytest.importorskip("vllm")
    process = patient(tmp_path, free_port(), setting)
    try:
        process.wait_for_line(state, 60)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill9()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 looks for modules in the current folder first")
def test_a_folder_of_the_same_name_is_not_taken_for_the_package(tmp_path: Path) -> None:
    (tmp_path / "vllm_spark").mkdir()
    command = child.python_module("vllm_spark", "--version")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()[-1]) == (0, __version__), done.stderr


def test_a_killed_follower_leaves_no_session(waiting: Process) -> None:
    session = waiting.descendants()
    os.kill(waiting.pid, signal.SIGKILL)
    wait_until_gone(session)


def wait_until_gone(processes: list[psutil.Process]) -> None:
    deadline = time.monotonic() + 10
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)
