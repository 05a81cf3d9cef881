"""Machines whose clocks are wrong: the leader's side here, the follower in a process with another wall clock."""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_spark.executor.channel import certificates
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.tls import TlsConnection, explain_failure

SECRET = b"one secret, long enough"
SOURCE = Path(__file__).with_name("clock.cpp")
FOLLOWER = """
import datetime, socket, ssl, sys
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.tls import TlsConnection, explain_failure
print(datetime.datetime.now(datetime.timezone.utc).year, flush=True)
plain = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=30)
try:
    made = TlsConnection(plain, tls_context(sys.argv[2].encode(), "follower"), server_side=False, timeout=30)
    data = bytearray(2)
    made.receive_into(memoryview(data), None)
    print(made.peer_name, bytes(data).decode())
except (OSError, EOFError) as error:
    print(explain_failure(error))
"""


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that gives a process another wall clock."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True, timeout=120)
    return library


def at(year: int, clock: Path) -> dict[str, str]:
    """The environment of a process at noon of the second of January of `year`."""
    then = datetime.datetime(year, 1, 2, 12, tzinfo=datetime.timezone.utc).timestamp()
    return {**os.environ, "LD_PRELOAD": str(clock), "CLOCK_OFFSET_SECONDS": str(int(then - time.time()))}


def meet(environment: dict[str, str], secret: bytes = SECRET) -> tuple[str, list[str]]:
    """What the leader's side says, empty if all is well; and what the follower's process printed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        process = subprocess.Popen(
            [sys.executable, "-c", FOLLOWER, str(server.getsockname()[1]), SECRET.decode()],
            env=environment,
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        outcome = ""
        try:
            plain, _ = server.accept()
            made = TlsConnection(plain, tls_context(secret, "leader"), server_side=True, timeout=30)
            made.send(b"ok", 30)
        except (OSError, ssl.SSLError) as error:
            outcome = explain_failure(error)
        finally:
            output, _ = process.communicate(timeout=60)
    return outcome, output.splitlines()


@pytest.mark.parametrize("year", [1970, 1998, 2019, 2126, 2261])
def test_a_clock_alone_keeps_nobody_out(clock: Path, year: int) -> None:
    assert meet(at(year, clock)) == ("", [str(year), "leader ok"])


def test_another_secret_is_named_whatever_the_clock(clock: Path) -> None:
    outcome, output = meet(at(1998, clock), b"another secret, as long")
    assert "the other side has another secret" in outcome
    assert "the other side has another secret" in output[-1]


@pytest.mark.parametrize(
    ("year", "here", "there"),
    [
        (1998, "its clock", "not valid yet by the clock of this machine, which says 1998-01-02"),
        (2126, "its clock", "no longer valid by the clock of this machine, which says 2126-01-02"),
    ],
)
def test_a_clock_is_named_where_it_decides(
    clock: Path, monkeypatch: pytest.MonkeyPatch, year: int, here: str, there: str
) -> None:
    """A peer of another version may have certificates that begin and end."""
    monkeypatch.setattr(certificates, "_VALID_FROM", datetime.datetime(2020, 1, 1))
    monkeypatch.setattr(certificates, "_VALID_UNTIL", datetime.datetime(2120, 1, 1))
    outcome, output = meet(at(year, clock))
    assert "another secret" not in output[-1]
    assert there in output[-1]
    assert "timedatectl" in output[-1]
    assert here in outcome
