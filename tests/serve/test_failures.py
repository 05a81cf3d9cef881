"""Whatever dies, the other side ends or waits again within seconds, the client hears of it, and nothing is left."""

from __future__ import annotations

import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from vllm_spark.errors import EXIT_LOST
from vllm_spark.local_pair import CPU_ENVIRONMENT
from vllm_spark.process import program

from . import prompts, shared_memory
from .hosts import Hosts
from .process import Process, assert_all_gone
from .servers import Server, spark_leader, spark_tp2
from .test_behaviour import DEVELOPMENT, EXTENSION, post

NOTICE_SECONDS = 5.0 + 3.0  # the promise is 5 s; the rest is for two busy cores


class Follower:
    """One `vllm-spark join` that outlives its leaders."""

    def __init__(self, hosts: Hosts) -> None:
        self.port = str(hosts[0].free_port())
        self.environment = CPU_ENVIRONMENT | {"SPARK_SECRET": secrets.token_hex(16)}
        argv = [program("vllm-spark"), "join", "--leader", hosts[0].address, "--port", self.port]
        self.process: Process = hosts[1].popen(argv, self.environment, "vllm-spark join")

    def waits(self) -> int:
        """How often it has said that it waits."""
        return self.process.output().count("Waiting for a leader at")

    def session(self) -> psutil.Process:
        """The process that follows the present leader."""
        (session,) = (
            child for child in self.process.descendants() if "vllm_spark.executor.follower" in child.cmdline()
        )
        return session


@pytest.fixture(scope="module")
def follower(hosts: Hosts) -> Iterator[Follower]:
    joined = Follower(hosts)
    yield joined
    joined.process.terminate()


@contextmanager
def leader(hosts: Hosts, follower: Follower, model: Path) -> Iterator[Server]:
    """A leader for `follower`, with a heartbeat time-out of 4 s."""
    with spark_leader(hosts, model, follower.port, ["--spark-heartbeat-timeout", "4"], follower.environment) as server:
        yield server


class Stream:
    """A streamed answer that is read in a thread; it never ends by itself."""

    def __init__(self, server: Server) -> None:
        self.tokens = 0
        self.error: Exception | None = None
        self._client = server.client
        self._model = server.client.models.list().data[0].id
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 60
        while self.tokens < 5 and self._thread.is_alive():
            assert time.monotonic() < deadline, "no token in a minute"
            time.sleep(0.05)

    def _read(self) -> None:
        try:
            for _ in self._client.completions.create(
                model=self._model, prompt="x", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
            ):
                self.tokens += 1
        except Exception as error:  # whatever tells the client that it will get no more
            self.error = error

    def failed(self) -> bool:
        """True if the client was told of an error within the promised time."""
        self._thread.join(NOTICE_SECONDS)
        return not self._thread.is_alive() and self.error is not None


def engine_of(server: Server) -> psutil.Process:
    """The engine's process, which vLLM calls VLLM::EngineCore."""
    (engine,) = (child for child in server.leader.descendants() if "EngineCore" in " ".join(child.cmdline()))
    return engine


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "generating"])
@pytest.mark.parametrize("victim", ["API server", "engine"])
def test_killed_leader(hosts: Hosts, follower: Follower, tiny_moe: Path, victim: str, busy: bool) -> None:
    before = shared_memory.listing()
    with leader(hosts, follower, tiny_moe) as server:
        stream = Stream(server) if busy else None
        waits, engine = follower.waits(), engine_of(server)
        assert len(shared_memory.holders(server.leader, follower.process)) == 2, "the ranks' memory can be seen"
        os.kill(server.leader.pid if victim == "API server" else engine.pid, signal.SIGKILL)
        follower.process.wait_until(lambda: follower.waits() > waits, NOTICE_SECONDS, "gone back to waiting")
        if stream is not None:
            assert stream.failed(), "the client was left in silence"
        assert_all_gone(server.leader, timeout=20)
    shared_memory.assert_as_before(before, follower.process)


def test_next_leader_works_with_the_same_follower(
    hosts: Hosts, follower: Follower, tiny_moe: Path, reference_tokens: list[list[int]]
) -> None:
    with leader(hosts, follower, tiny_moe) as server:
        assert prompts.greedy_tokens(server.client, prompts.PROMPTS[:4]) == reference_tokens[:4]
        waits = follower.waits()
        server.leader.terminate()
    follower.process.wait_until(lambda: follower.waits() > waits, NOTICE_SECONDS, "gone back to waiting")
    assert follower.process.exit_code is None


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "generating"])
def test_killed_follower(hosts: Hosts, follower: Follower, tiny_moe: Path, busy: bool) -> None:
    before = shared_memory.listing()
    with leader(hosts, follower, tiny_moe) as server:
        stream = Stream(server) if busy else None
        os.kill(follower.session().pid, signal.SIGKILL)
        server.leader.wait_for_line("Serving ends: .*the follower on .* (closed the connection|broke)", NOTICE_SECONDS)
        if stream is not None:
            assert stream.failed(), "the client was left in silence"
            assert "start it again if it ended" in str(stream.error)
        assert server.leader.wait(30) == EXIT_LOST, "a supervisor must see that it failed"
        assert "Traceback" not in server.leader.output()
        assert_all_gone(server.leader)
    shared_memory.assert_as_before(before, follower.process)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "generating"])
@pytest.mark.parametrize("side", ["leader", "follower"])
def test_frozen_peer(hosts: Hosts, follower: Follower, tiny_moe: Path, side: str, busy: bool) -> None:
    before = shared_memory.listing()
    with leader(hosts, follower, tiny_moe) as server:
        prompts.greedy_tokens(server.client, prompts.PROMPTS[:1], max_tokens=4)  # from now on the short time-out counts
        stream = Stream(server) if busy else None
        waits = follower.waits()
        frozen = engine_of(server) if side == "leader" else follower.session()
        frozen.suspend()
        try:
            if side == "leader":
                follower.process.wait_until(
                    lambda: follower.waits() > waits, 4 + NOTICE_SECONDS, "gone back to waiting"
                )
                assert "gave no sign of life for" in follower.process.output()
            else:
                server.leader.wait_for_line("Serving ends: .* gave no sign of life for", 4 + NOTICE_SECONDS)
                assert stream is None or stream.failed(), "the client was left in silence"
                assert server.leader.wait(30) == EXIT_LOST
        finally:
            with suppress(psutil.NoSuchProcess):
                frozen.kill()
        assert_all_gone(server.leader, timeout=20)
        assert stream is None or stream.failed()
    shared_memory.assert_as_before(before, follower.process)


def test_killed_join_leaves_nothing(hosts: Hosts, tiny_moe: Path) -> None:
    before = shared_memory.listing()
    joined = Follower(hosts)
    with leader(hosts, joined, tiny_moe) as server:
        stream = Stream(server)
        os.kill(joined.process.pid, signal.SIGKILL)
        assert stream.failed()
        assert_all_gone(joined.process)
        assert server.leader.wait(30) != 0
        assert_all_gone(server.leader)
    shared_memory.assert_as_before(before)


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGINT, os.killpg),  # a terminal's Ctrl-C: to every process of the group
        (signal.SIGTERM, os.killpg),  # systemd's stop
        (signal.SIGTERM, os.kill),  # a supervisor's: to the process that it started
        (signal.SIGINT, os.kill),
    ],
)
def test_one_signal_ends_a_leader_that_waits(
    hosts: Hosts, tiny_moe: Path, number: signal.Signals, to: Callable[[int, int], None]
) -> None:
    port = str(hosts[0].free_port())
    with spark_leader(hosts, tiny_moe, port, env={"SPARK_SECRET": secrets.token_hex(16)}, wait=False) as server:
        server.leader.wait_for_line("Waiting for the follower", 120)
        to(server.leader.pid, number)
        assert server.leader.wait(20) == 128 + number
        assert f"vllm serve --spark: stopped by {number.name} before it served" in server.leader.output()
        assert "Traceback" not in server.leader.output()
        assert_all_gone(server.leader)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_join_says_goodbye(hosts: Hosts, tiny_moe: Path, number: signal.Signals) -> None:
    joined = Follower(hosts)
    with leader(hosts, joined, tiny_moe) as server:
        os.kill(joined.process.pid, number)
        assert joined.process.wait(10) == 0
        assert f"Stopped by {number.name}." in joined.process.output()
        assert server.leader.wait(30) == EXIT_LOST
        assert re.search(
            "vllm serve --spark: the follower on .* left: it was stopped there; see what", server.leader.output()
        )
        assert_all_gone(joined.process, server.leader)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_call_that_fails_on_one_rank(hosts: Hosts, tiny_moe: Path, rank: int) -> None:
    """The other rank waits in a collective; it is not left there until the collective's own time-out of minutes."""
    with spark_tp2(hosts, tiny_moe, EXTENSION, DEVELOPMENT) as server:
        start = time.monotonic()
        with suppress(OSError):  # the server may end before it answers
            assert post(server, "/collective_rpc", {"method": "fail_on", "args": [rank]}) >= 500
        assert server.leader.wait(60) == 1
        assert time.monotonic() - start < 60
        whose = ("the leader's worker failed", "its worker failed in 'fail_on'")[rank]
        message = re.search(r"Serving ends: (.*)", server.leader.output())
        assert message is not None
        assert whose in message[1]
        assert "RuntimeError: planted failure" in message[1]
        assert_all_gone(server.leader, timeout=20)
