"""Whatever dies, the other side ends or waits again within seconds, the client hears of it, and nothing is left."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from vllm_spark.backend.ipc_folder import PREFIX
from vllm_spark.errors import EXIT_LOST
from vllm_spark.processes.local import CPU_ENVIRONMENT
from vllm_spark.processes.managed import answers, program

from . import prompts, shared_memory
from .development import DEVELOPMENT, EXTENSION, call, post
from .hosts import Hosts
from .process import Process, assert_all_gone, descendant
from .servers import START_SECONDS, Server, spark_leader, spark_tp2

NOTICE_SECONDS = 5.0
"""The promise: so long after a death the other side has ended or waits again, and the client was told."""

STOP_SECONDS = 15.0
"""For a server that is asked to end: its engine has 5 s to end its requests."""

HEARTBEAT_SECONDS = 4.0
"""The silence after which a frozen process counts as dead here: the time-out of every leader below."""


class Clock:
    """The time since something died or froze, of which only so much may pass until others have noticed.

    `note` prints how long that took; `pytest -rP` shows the lines of tests that passed.
    """

    def __init__(self, allowed: float = NOTICE_SECONDS) -> None:
        self._start, self._allowed = time.monotonic(), allowed

    @property
    def left(self) -> float:
        """Seconds that may still pass: the time-out of whoever waits."""
        return max(0.0, self._start + self._allowed - time.monotonic())

    def note(self, what: str, at: float | None = None) -> None:
        """Says when it happened: now, or at the time `at` of time.monotonic()."""
        print(f"noticed: {what} after {(time.monotonic() if at is None else at) - self._start:.1f} s")


def kill9(pid: int) -> Clock:
    """Kills a process as nothing can prevent."""
    os.kill(pid, signal.SIGKILL)
    return Clock()


class Follower:
    """One `vllm-spark join` that outlives its leaders."""

    def __init__(self, hosts: Hosts) -> None:
        self.port = str(hosts[0].free_port())
        self.environment = CPU_ENVIRONMENT | {"VLLMSPARK_SECRET": secrets.token_hex(16)}
        argv = [program("vllm-spark"), "join", "--leader", hosts[0].address, "--port", self.port]
        self.process: Process = hosts[1].popen(argv, self.environment, "vllm-spark join")

    def waits(self) -> int:
        """How often it has said that it waits."""
        return self.process.output().count("Waiting for a leader at")

    def wait_until_it_has_loaded(self) -> None:
        """Waits until its present session has its half of the model."""
        loaded = self._loaded()
        self.process.wait_until(lambda: self._loaded() > loaded, START_SECONDS, "loaded its half of the model")

    def _loaded(self) -> int:
        return self.process.output().count("This rank's half of the model is loaded.")

    def wait_until_it_waits_again(self, waits: int, clock: Clock) -> None:
        """Waits until it says once more than `waits` times that it waits, as long as the clock allows."""
        self.process.wait_until(lambda: self.waits() > waits, clock.left, "gone back to waiting")
        clock.note("the follower waits again")

    def session(self) -> psutil.Process:
        """The process that follows the present leader."""
        return descendant(self.process, "vllm_spark.entrypoints.follower_process")


@pytest.fixture(scope="module")
def follower(hosts: Hosts) -> Iterator[Follower]:
    joined = Follower(hosts)
    yield joined
    joined.process.terminate()


@pytest.fixture(scope="module", autouse=True)
def temporary(hosts: Hosts) -> Iterator[Path]:
    """A temporary folder for the processes of these tests alone, with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="vsp") as name:
        for host in hosts:
            host.environment["TMPDIR"] = name
        yield Path(name)
        for host in hosts:
            del host.environment["TMPDIR"]


def abandoned_socket_folders(temporary: Path) -> set[Path]:
    """Those of dead leaders: nobody has locked them."""
    left = set()
    for folder in temporary.glob(f"{PREFIX}*"):
        with suppress(OSError), (folder / "owner").open() as owner:  # gone, or locked
            fcntl.flock(owner, fcntl.LOCK_SH | fcntl.LOCK_NB)
            left.add(folder)
    return left


@pytest.fixture(autouse=True)
def no_sockets_left(temporary: Path) -> Iterator[None]:
    """Whichever process died, vLLM's sockets are gone with the leader of a test."""
    yield
    deadline = time.monotonic() + 10
    while (left := abandoned_socket_folders(temporary)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == set()


@contextmanager
def leader(hosts: Hosts, follower: Follower, model: Path) -> Iterator[Server]:
    """A leader for `follower`, with a short heartbeat time-out."""
    arguments = ["--spark-heartbeat-timeout", str(HEARTBEAT_SECONDS)]
    with spark_leader(hosts, model, follower.port, arguments, follower.environment) as server:
        yield server


class Stream:
    """A streamed answer that is read in a thread; it never ends by itself."""

    def __init__(self, server: Server) -> None:
        self.tokens = 0
        self.error: Exception | None = None
        self._ended = 0.0
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
        self._ended = time.monotonic()

    def assert_told(self, clock: Clock) -> None:
        """Fails the test if the client gets no error as long as the clock allows."""
        self._thread.join(clock.left)
        assert not self._thread.is_alive(), "the client was left in silence"
        assert self.error is not None, "the answer came to an end as if it were whole"
        clock.note("the client was told", self._ended)

    def assert_over(self, clock: Clock) -> None:
        """Fails the test if the answer goes on, or nothing comes, longer than the clock allows."""
        self._thread.join(clock.left)
        assert not self._thread.is_alive(), "the client was left in silence"
        assert self.tokens < 1000, "the answer was complete before it was stopped"
        clock.note("the answer was over", self._ended)


SERVES = "Application startup complete"
JOINED = "The follower on .* joined"
LOST = "Serving ends: .*the follower on .* (closed the connection|broke)"


def engine_of(server: Server) -> psutil.Process:
    """The engine's process, which vLLM calls VLLM::EngineCore."""
    return descendant(server.leader, "EngineCore")


@pytest.mark.parametrize("busy", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["idle", "generating"])
@pytest.mark.parametrize("victim", ["API server", "engine"])
def test_killed_leader(hosts: Hosts, follower: Follower, tiny_moe: Path, victim: str, busy: bool) -> None:
    before = shared_memory.listing(*hosts)
    with leader(hosts, follower, tiny_moe) as server:
        stream = Stream(server) if busy else None
        waits, engine = follower.waits(), engine_of(server)
        assert len(shared_memory.holders(server.leader, follower.process)) == 2, "the ranks' memory can be seen"
        clock = kill9(server.leader.pid if victim == "API server" else engine.pid)
        follower.wait_until_it_waits_again(waits, clock)
        if stream is not None:
            stream.assert_told(clock)
        if victim == "engine":
            assert server.leader.wait(30) == 1, "a supervisor must see that it failed"
            said = f"the engine (process {engine.pid}) was killed or crashed (exit status unknown"
            assert f"vllm serve --spark: {said}" in server.leader.output()
            assert "Traceback" not in server.leader.output()
        assert_all_gone(server.leader, timeout=20)
    shared_memory.assert_as_before(before, follower.process, hosts=hosts)


def test_next_leader_works_with_the_same_follower(
    hosts: Hosts, follower: Follower, tiny_moe: Path, reference_tokens: list[list[int]]
) -> None:
    with leader(hosts, follower, tiny_moe) as server:
        assert prompts.greedy_tokens(server.client, prompts.PROMPTS[:4]) == reference_tokens[:4]
        stream = Stream(server)
        waits, before = follower.waits(), len(follower.process.output())
        os.kill(server.leader.pid, signal.SIGINT)
        clock = Clock(STOP_SECONDS)
        stream.assert_over(clock)
        follower.wait_until_it_waits_again(waits, clock)
        assert server.leader.wait(30) == 0
    assert follower.process.exit_code is None
    assert "The leader is lost" not in follower.process.output()[before:], "a leader that is stopped sends the reason"


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.thorough)])
def test_a_stop_is_an_orderly_end_although_the_engine_hangs(
    hosts: Hosts, follower: Follower, tiny_moe: Path, number: signal.Signals
) -> None:
    """vLLM kills an engine that has not ended some seconds after the request; that is no failure of the engine."""
    before = shared_memory.listing(*hosts)
    with leader(hosts, follower, tiny_moe) as server:
        stream = Stream(server)
        waits, engine = follower.waits(), engine_of(server)
        engine.suspend()
        os.kill(server.leader.pid, number)
        clock = Clock(STOP_SECONDS)
        try:
            assert server.leader.wait(30) == 0, "as stock vLLM, and as README promises"
        finally:
            with suppress(psutil.NoSuchProcess):
                engine.kill()
        output = server.leader.output()
        assert f"force killing remaining process EngineCore pid {engine.pid}" in output, "the engine did hang"
        assert "killed or crashed" not in output
        assert "Traceback" not in output
        stream.assert_over(clock)
        assert stream.error is None or "the server was stopped" in str(stream.error)
        follower.wait_until_it_waits_again(waits, clock)
        assert_all_gone(server.leader, timeout=20)
    shared_memory.assert_as_before(before, follower.process, hosts=hosts)


@pytest.mark.parametrize("busy", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["idle", "generating"])
def test_killed_follower(hosts: Hosts, follower: Follower, tiny_moe: Path, busy: bool) -> None:
    before = shared_memory.listing(*hosts)
    with leader(hosts, follower, tiny_moe) as server:
        stream = Stream(server) if busy else None
        clock = kill9(follower.session().pid)
        server.leader.wait_for_line(LOST, clock.left)
        clock.note("the leader says that serving ends")
        if stream is not None:
            stream.assert_told(clock)
            assert "start it again if it ended" in str(stream.error)
        assert server.leader.wait(30) == EXIT_LOST, "a supervisor must see that it failed"
        clock.note("the leader has ended")
        assert "Traceback" not in server.leader.output()
        assert_all_gone(server.leader)
    shared_memory.assert_as_before(before, follower.process, hosts=hosts)


@pytest.mark.parametrize("moment", [pytest.param("joined", marks=pytest.mark.thorough), "loaded"])
def test_killed_follower_during_the_start(hosts: Hosts, follower: Follower, tiny_moe: Path, moment: str) -> None:
    """As soon as the pair is formed, and when the follower has loaded its half of the model."""
    before = shared_memory.listing(*hosts)
    with spark_leader(hosts, tiny_moe, follower.port, env=follower.environment, wait=False) as server:
        if moment == "joined":
            server.leader.wait_for_line(JOINED, START_SECONDS)
        else:
            follower.wait_until_it_has_loaded()
        assert SERVES not in server.leader.output(), "it is still starting"
        waits = follower.waits()  # only now: it says so again while it waits for long
        clock = kill9(follower.session().pid)
        server.leader.wait_for_line(LOST, clock.left)
        clock.note("the leader says that its start ends")
        follower.wait_until_it_waits_again(waits, clock)
        assert server.leader.wait(30) == EXIT_LOST
        clock.note("the leader has ended")
        (sentence,) = re.findall("^vllm serve --spark: .*", server.leader.output(), re.MULTILINE)
        assert re.search("the follower on .* (closed the connection|broke).* start it again if it ended", sentence)
        assert "Traceback" not in server.leader.output()
        assert_all_gone(server.leader)
    shared_memory.assert_as_before(before, follower.process, hosts=hosts)


def test_killed_api_server_during_the_start(hosts: Hosts, follower: Follower, tiny_moe: Path) -> None:
    before = shared_memory.listing(*hosts)
    with spark_leader(hosts, tiny_moe, follower.port, env=follower.environment, wait=False) as server:
        server.leader.wait_for_line(JOINED, START_SECONDS)
        assert SERVES not in server.leader.output(), "it is still starting"
        waits = follower.waits()
        clock = kill9(server.leader.pid)
        follower.wait_until_it_waits_again(waits, clock)
        assert_all_gone(server.leader, timeout=20)
    shared_memory.assert_as_before(before, follower.process, hosts=hosts)


@pytest.mark.parametrize("busy", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["idle", "generating"])
@pytest.mark.parametrize("side", ["leader", "follower"])
def test_frozen_peer(hosts: Hosts, follower: Follower, tiny_moe: Path, side: str, busy: bool) -> None:
    before = shared_memory.listing(*hosts)
    with leader(hosts, follower, tiny_moe) as server:
        prompts.greedy_tokens(server.client, prompts.PROMPTS[:1], max_tokens=4)  # from now on the short time-out counts
        stream = Stream(server) if busy else None
        waits, before_frozen = follower.waits(), len(follower.process.output())
        frozen = engine_of(server) if side == "leader" else follower.session()
        frozen.suspend()
        clock = Clock(HEARTBEAT_SECONDS + NOTICE_SECONDS)
        try:
            if side == "leader":
                follower.wait_until_it_waits_again(waits, clock)
                assert "sent no heartbeat for" in follower.process.output()[before_frozen:]
            else:
                server.leader.wait_for_line("Serving ends: .* sent no heartbeat for", clock.left)
                clock.note("the leader says that serving ends")
                if stream is not None:
                    stream.assert_told(clock)
                assert server.leader.wait(30) == EXIT_LOST
        finally:
            with suppress(psutil.NoSuchProcess):
                frozen.kill()
        assert_all_gone(server.leader, timeout=20)
        if stream is not None and side == "leader":
            stream.assert_told(Clock())  # only now: until then its server was frozen
    shared_memory.assert_as_before(before, follower.process, hosts=hosts)


def test_killed_join_leaves_nothing(hosts: Hosts, tiny_moe: Path) -> None:
    before = shared_memory.listing(*hosts)
    joined = Follower(hosts)
    with leader(hosts, joined, tiny_moe) as server:
        stream = Stream(server)
        clock = kill9(joined.process.pid)
        server.leader.wait_for_line(LOST, clock.left)
        clock.note("the leader says that serving ends")
        stream.assert_told(clock)
        assert_all_gone(joined.process)
        assert server.leader.wait(30) != 0
        assert_all_gone(server.leader)
    shared_memory.assert_as_before(before, hosts=hosts)


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGINT, os.killpg),  # a terminal's Ctrl-C: to every process of the group
        pytest.param(signal.SIGTERM, os.killpg, marks=pytest.mark.thorough),  # systemd's stop
        (signal.SIGTERM, os.kill),  # a supervisor's: to the process that it started
        pytest.param(signal.SIGINT, os.kill, marks=pytest.mark.thorough),
    ],
)
def test_one_signal_ends_a_leader_that_waits(
    hosts: Hosts, tiny_moe: Path, number: signal.Signals, to: Callable[[int, int], None]
) -> None:
    port = str(hosts[0].free_port())
    with spark_leader(hosts, tiny_moe, port, env={"VLLMSPARK_SECRET": secrets.token_hex(16)}, wait=False) as server:
        server.leader.wait_for_line("Waiting for the follower", 120)
        to(server.leader.pid, number)
        assert server.leader.wait(20) == 128 + number
        assert f"vllm serve --spark: stopped by {number.name} before it served" in server.leader.output()
        assert "Traceback" not in server.leader.output()
        assert_all_gone(server.leader)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.thorough), signal.SIGTERM])
def test_stopped_join_sends_the_reason(hosts: Hosts, tiny_moe: Path, number: signal.Signals) -> None:
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


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.thorough), 1])
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


COLLECTIVE_SECONDS = 10.0
"""How long a rank waits in a collective for the other one where it gets stuck below: longer than a busy machine takes
to schedule both."""


def assert_both_end(server: Server, stream: Stream, clock: Clock, sentence: str) -> None:
    """In time `/health` is red, the client is told, and the follower waits again, all with that sentence."""
    assert server.follower is not None
    server.leader.wait_until(lambda: not answers(f"{server.url}/health"), clock.left, "become unhealthy")
    clock.note("/health is red")
    stream.assert_told(clock)
    waits_again = r"(?s)Ready: this machine runs every step.*Waiting for a leader at"
    server.follower.wait_for_line(waits_again, clock.left)
    clock.note("the follower waits again")
    assert server.leader.wait(30) != 0
    for said in (server.leader.output(), server.follower.output(), str(stream.error)):
        assert re.search(sentence, said), said
    assert_all_gone(server.leader, timeout=20)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_stuck_collective_makes_health_red(hosts: Hosts, tiny_moe: Path, rank: int) -> None:
    """A rank does not come to a collective. Both send heartbeats: nothing but the time-out ends the wait."""
    arguments = [*EXTENSION, "--spark-collective-timeout", str(COLLECTIVE_SECONDS)]
    with spark_tp2(hosts, tiny_moe, arguments, DEVELOPMENT) as server:
        stream = Stream(server)
        call(server, "hang_in_the_next_step_on", rank, 60.0)
        clock = Clock(COLLECTIVE_SECONDS + NOTICE_SECONDS)
        waited = f"rank {1 - rank} waited for rank {rank} .* it did not come within {COLLECTIVE_SECONDS:.1f} s"
        assert_both_end(server, stream, clock, waited)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("fail_in_the_next_step_on", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        pytest.param(
            "write_to_a_full_disk_in_the_next_step_on",
            r"OSError: \[Errno 28\] No space left on device",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_a_step_that_fails_on_one_rank(hosts: Hosts, tiny_moe: Path, fault: str, seen: str, rank: int) -> None:
    """The other rank waits in a collective of the same step, and its time-out is minutes."""
    with spark_tp2(hosts, tiny_moe, EXTENSION, DEVELOPMENT) as server:
        stream = Stream(server)
        call(server, fault, rank)
        assert_both_end(server, stream, Clock(), seen)


@pytest.mark.parametrize(
    ("ranks", "method"),
    [
        pytest.param("0", "load_model", id="leader loads", marks=pytest.mark.thorough),
        pytest.param("0 1", "load_model", id="both load"),
        pytest.param("1", "determine_available_memory", id="follower measures memory", marks=pytest.mark.thorough),
    ],
)
def test_a_worker_that_fails_while_the_engine_starts(hosts: Hosts, tiny_moe: Path, ranks: str, method: str) -> None:
    """One sentence and one traceback, whichever rank is first. Of two that fail alike the follower is the later one."""
    arguments = ["--worker-extension-cls", "tests.serve.failing_extension.Failing"]
    environment = {"FAILING_RANKS": ranks, "FAILING_IN": method, "PYTHONPATH": str(Path(__file__).parents[2])}
    with spark_tp2(hosts, tiny_moe, arguments, environment, wait=False) as server:
        assert server.leader.wait(START_SECONDS) == 1
        output = server.leader.output()
        (sentence,) = re.findall("^vllm serve --spark: .*", output, re.MULTILINE)
        assert sentence.endswith(f"failed: ValueError: planted failure of rank {ranks[0]}.")
        assert output.count("Traceback") == 1
        assert_all_gone(server.leader)


START_COLLECTIVE_SECONDS = 15.0
"""The same while the engine starts, where a rank may wait for the other one to warm up."""


def start_with(extension: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and variables of a pair whose workers have this extension."""
    arguments = ["--worker-extension-cls", f"tests.serve.{extension}"]
    arguments += ["--spark-collective-timeout", str(START_COLLECTIVE_SECONDS)]
    return arguments, {"PYTHONPATH": str(Path(__file__).parents[2]), **environment}


@pytest.mark.parametrize("silent", ["killed", "hangs"])
def test_an_engine_that_never_answers_its_server(hosts: Hosts, tiny_moe: Path, silent: str) -> None:
    """It has started, and vLLM's server does not look after it before it serves. A signal must end that wait too."""
    arguments, environment = start_with("silent_extension.Silent", SILENT=silent)
    with spark_tp2(hosts, tiny_moe, arguments, environment, wait=False) as server:
        if silent == "hangs":
            server.leader.wait_for_line("The engine has been asked", START_SECONDS)
            server.leader.terminate()
        status = server.leader.wait(START_SECONDS if silent == "killed" else STOP_SECONDS)
        (sentence,) = re.findall("^vllm serve --spark: .*", server.leader.output(), re.MULTILINE)
        if silent == "killed":
            assert re.search(r"the engine \(process \d+\) was killed or crashed .*; start it again", sentence)
            assert status == 1
        else:
            assert "stopped by SIGTERM before it served" in sentence
            assert status == 128 + signal.SIGTERM
        assert "Traceback" not in server.leader.output()
        assert_all_gone(server.leader)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.thorough), 1])
def test_a_rank_that_does_not_end_its_warm_up(hosts: Hosts, tiny_moe: Path, rank: int) -> None:
    """The other one has ended it and waits in no collective."""
    arguments, environment = start_with("hanging_extension.Hanging", HANGING_RANK=str(rank))
    with spark_tp2(hosts, tiny_moe, arguments, environment, wait=False) as server:
        assert server.leader.wait(START_SECONDS) == 1
        (sentence,) = re.findall("^vllm serve --spark: .*", server.leader.output(), re.MULTILINE)
        who = "the leader" if rank == 0 else "the follower on .*"
        assert re.search(
            f"{who} has not finished compilation and warm-up within {START_COLLECTIVE_SECONDS:g} s after the other "
            "rank; see its log, and if one machine takes longer, .* raise --spark-collective-timeout",
            sentence,
        )
        assert server.follower is not None
        server.follower.wait_for_line("(?s)has not finished compilation.*Waiting for a leader at", NOTICE_SECONDS)
        assert_all_gone(server.leader)


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 1])
def test_autotuning_that_one_rank_has_done_before(hosts: Hosts, tiny_moe: Path, rank: int, tmp_path: Path) -> None:
    """It goes on to the next step of the model, and the other one waits for it to tune: a dead end that is named."""
    arguments, environment = start_with(
        "autotuning_extension.Autotuning",
        VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR=str(tmp_path),
        VLLM_FLASHINFER_AUTOTUNE_SKIP_OPS="",
        TUNED_RANK=str(rank),
    )
    with spark_tp2(hosts, tiny_moe, arguments, environment, wait=False) as server:
        assert server.leader.wait(START_SECONDS) in (1, EXIT_LOST)
        (sentence,) = re.findall("^vllm serve --spark: .*", server.leader.output(), re.MULTILINE)
        assert f"within {START_COLLECTIVE_SECONDS:g}" in sentence
        assert re.search("rank . was in FlashInfer's autotuning, rank . in FlashInfer's autotuning", sentence)
        assert "start with --no-enable-flashinfer-autotune" in sentence
        assert_all_gone(server.leader)


@pytest.mark.thorough
def test_autotuning_with_a_cache_on_one_machine_or_both(hosts: Hosts, tiny_moe: Path, tmp_path: Path) -> None:
    arguments, environment = start_with(
        "autotuning_extension.Autotuning",
        VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR=str(tmp_path),
        VLLM_FLASHINFER_AUTOTUNE_SKIP_OPS="",
        TUNED_RANK="",
    )

    def start() -> list[bool]:
        """Whether each rank has tuned anything."""
        with spark_tp2(hosts, tiny_moe, arguments, environment) as server:
            return ["tuned gemm" in process.output() for process in server.processes]

    assert start() == [True, True]
    assert start() == [False, False], "both load their own"
    (theirs,) = tmp_path.rglob("*rank1*")
    theirs.unlink()
    assert start() == [True, True], "what only one of them has is not used"
