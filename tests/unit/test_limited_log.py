"""Many connections that are turned away: few lines, all of them counted."""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Iterator

import pytest

from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.handshake.limited_log import LimitedLog
from vllm_spark.executor.handshake.server import Listener

from .test_channel import LIMIT, SECRET, assert_usable, port_of, wait_for

MANY = 400


@pytest.fixture
def log() -> Iterator[LimitedLog]:
    made = LimitedLog("rejected connections", interval=3600.0)
    yield made
    made.close()


def test_malformed_connections_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """To a real listener, which goes on working; what it did not log one by one is in one line at its end."""
    listener = Listener("127.0.0.1", 0, tls_context(SECRET, "leader"), LIMIT)
    for _ in range(MANY):
        with socket.create_connection(("127.0.0.1", port_of(listener)), timeout=10) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert_usable(listener)
    wait_for(lambda: listener._rejected.total == MANY, "all were greeted")
    listener.close()
    lines = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    single = [line for line in lines if line.startswith("Rejected a connection from 127.0.0.1: ")]
    (summary,) = (line for line in lines if "more rejected connections" in line)
    assert len(lines) == len(single) + 1 < 20
    assert len(single) + int(re.findall(r"\d+", summary)[0]) == MANY
    assert "from 127.0.0.1" in summary


def test_the_first_are_logged_and_the_rest_summed_up(log: LimitedLog, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(10):
        log.add("10.0.0.9", "noise", "A line about noise.")
    log.add("10.0.0.9", "scan", "A line about a scan.")
    assert caplog.messages == ["A line about noise."] * 3 + ["A line about a scan."]
    caplog.clear()
    log.summarize()
    assert caplog.messages == ["7 more rejected connections: 7 from 10.0.0.9 (noise)."]
    caplog.clear()
    log.add("10.0.0.9", "noise", "A line about noise.")
    assert caplog.messages == []  # it has not stopped
    log.summarize()
    log.summarize()
    caplog.clear()
    log.add("10.0.0.9", "noise", "A line about noise.")
    assert caplog.messages == ["A line about noise."]  # it had stopped


def test_a_summary_comes_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    log = LimitedLog("things", interval=0.2)
    for _ in range(5):
        log.add("a", "b", "one")
    wait_for(lambda: "2 more things: 2 from a (b)." in caplog.messages, "the summary")
    log.close()
    assert "spark-limited-log" not in [thread.name for thread in threading.enumerate()]


def test_memory_is_bounded(log: LimitedLog, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(10_000):
        log.add(f"10.0.{number >> 8}.{number & 255}", "noise", f"A line about {number}.")
    assert len(log._seen) <= 64
    assert len(caplog.messages) < 100
    caplog.clear()
    log.summarize()
    (line,) = caplog.messages
    counts = [int(count) for count in re.findall(r"\d+(?= from| more)", line)]
    assert counts[0] == sum(counts[1:]) == 10_000 - 64
    assert "from other addresses" in line


def test_nothing_is_said_of_nothing(log: LimitedLog, caplog: pytest.LogCaptureFixture) -> None:
    log.summarize()
    log.close()
    assert caplog.messages == []
