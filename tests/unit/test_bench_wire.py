"""How the two machines of `bench wire` meet, over real connections of this machine: no RDMA is needed for that."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from vllm_spark.bench.wire import BenchHello, BenchSession, Plan, measure, steps
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import PeerLostError, RefusedError, SparkError
from vllm_spark.executor.channel.addresses import LOOPBACK
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.framing import MIB, Kind
from vllm_spark.executor.channel.secret import load_secret
from vllm_spark.executor.handshake.client import Connector
from vllm_spark.executor.handshake.messages import CONTROL
from vllm_spark.processes.local import free_ports

PATIENCE = 60.0


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> SparkConfig:
    monkeypatch.setenv("VLLMSPARK_SECRET", "a secret for these tests")
    (port,) = free_ports(1)
    return SparkConfig(address=LOOPBACK, leader=LOOPBACK, port=port)


@contextmanager
def sessions(config: SparkConfig) -> Iterator[tuple[BenchSession, BenchSession]]:
    with ThreadPoolExecutor() as threads:
        listening = threads.submit(BenchSession.listen, config, PATIENCE)
        connecting = threads.submit(BenchSession.connect, config, PATIENCE)
        with listening.result() as one, connecting.result() as other:
            yield one, other


def test_both_swap_what_they_have_to_say(config: SparkConfig) -> None:
    greetings = BenchHello("one", "a machine", Plan(depth=7)), BenchHello("other", "another")
    with sessions(config) as ends, ThreadPoolExecutor() as threads:
        first = [threads.submit(end.handshake, mine, BenchHello) for end, mine in zip(ends, greetings, strict=True)]
        assert [said.result() for said in first] == [greetings[1], greetings[0]]
        for number in range(20):
            mine = b"%d" % number, b"-%d" % number
            said = [threads.submit(end.exchange, half) for end, half in zip(ends, mine, strict=True)]
            assert [half.result() for half in said] == [mine[1], mine[0]]


def test_what_comes_early_waits_for_its_turn(config: SparkConfig) -> None:
    with sessions(config) as (one, other), ThreadPoolExecutor() as threads:
        later = threads.submit(one.exchange, b"early")
        deadline = time.monotonic() + PATIENCE
        while not other._received and time.monotonic() < deadline:
            other.check_peer()
        other.check_peer()  # and one message of a step is all there can be
        assert other.exchange(b"late") == b"early"
        assert later.result() == b"late"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (SparkError("its rail failed"), "the other machine (.*) failed: its rail failed"),
        (KeyboardInterrupt(), "the other machine (.*) failed: it was stopped there"),
    ],
)
@pytest.mark.parametrize("waits", ["attend", "exchange"])
def test_one_that_gives_up_says_why(config: SparkConfig, error: BaseException, sentence: str, waits: str) -> None:
    with sessions(config) as (one, other):
        other.__exit__(type(error), error, None)

        def wait() -> None:
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                one.check_peer() if waits == "attend" else one.exchange(b"")

        with pytest.raises(PeerLostError, match=sentence):
            wait()


def test_one_that_dies_is_lost(config: SparkConfig) -> None:
    with sessions(config) as (one, other):
        other._connection.close()
        with pytest.raises(PeerLostError, match="closed the connection"):
            one.exchange(b"")


def test_a_follower_that_comes_by_is_no_partner(config: SparkConfig) -> None:
    """`vllm-spark join` waits for a leader's offer, and leaves when it gets something else."""
    caller = Connector(LOOPBACK, config.port, tls_context(load_secret(config, LOOPBACK), "follower"), MIB)
    with ThreadPoolExecutor() as threads:
        listening = threads.submit(BenchSession.listen, config, PATIENCE)
        connection = None
        deadline = time.monotonic() + PATIENCE
        while connection is None and time.monotonic() < deadline:
            connection = caller.connect(CONTROL)
        assert connection is not None
        with listening.result() as session:
            greeted = threads.submit(session.handshake, BenchHello("one", ""), BenchHello)
            assert connection.expect(Kind.EXCHANGE, timeout=PATIENCE).kind is Kind.EXCHANGE
            connection.close()
            with pytest.raises(RefusedError, match=r"run vllm-spark bench wire --connect there, and neither .* join"):
                greeted.result()


def test_nobody_comes(config: SparkConfig) -> None:
    with pytest.raises(PeerLostError, match=rf"within 1 s; in another terminal run: .* --connect .*:{config.port}$"):
        BenchSession.listen(config, 1.0)
    with pytest.raises(PeerLostError, match=rf"nothing listened at {LOOPBACK}:{config.port} within 1 s; .* --listen"):
        BenchSession.connect(config, 1.0)


def test_two_machines_without_a_network_in_common(config: SparkConfig) -> None:
    """Both say so, and nobody waits for the other."""
    from vllm_spark.collective.rails import Port, PortAddress

    def ports(network: str) -> list[Port]:
        return [Port("rxe0", 1, 1024, (PortAddress(bytes(12) + bytes([10, 0, 0, 1]), network),))]

    def nothing(*_: Any) -> None: ...

    with sessions(config) as (one, other), ThreadPoolExecutor() as threads:
        done = [
            threads.submit(measure, one, 0, Plan(), ports("10.0.0.0/24"), nothing, nothing),
            threads.submit(measure, other, 1, None, ports("10.0.1.0/24"), nothing, nothing),
        ]
        for each in done:
            with pytest.raises(SparkError, match="no RDMA port here is in one network"):
                each.result()


def test_the_schedule() -> None:
    plan = Plan(sizes=(2, 4), bandwidth_sizes=(8,))
    assert [(step.rails, step.latency, step.bytes) for step in steps(plan, 2)] == [
        (rails, kind, size) for rails in ((0,), (1,), (0, 1)) for kind, size in ((True, 2), (True, 4), (False, 8))
    ]
    assert len(list(steps(plan, 1))) == 3, "one rail is all of them"
