"""What a broken pair does to those who wait, without vLLM."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from functools import partial

import pytest

from vllm_spark.backend.status import EngineStatus
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import PeerLostError
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.framing import Connection, Kind
from vllm_spark.executor.handshake.messages import Reason
from vllm_spark.executor.handshake.server import Follower, Listener
from vllm_spark.executor.leader_session import LeaderSession
from vllm_spark.executor.rpc import RELOAD_WEIGHTS, SILENT_SECONDS, decode_header, encode_result
from vllm_spark.executor.store import PairStore
from vllm_spark.processes.local import free_ports
from vllm_spark.ranks import LEADER_RANK
from vllm_spark.records import to_json

from .test_channel import LIMIT, OFFER, SECRET, connections


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener("127.0.0.1", 0, tls_context(SECRET, "leader"), LIMIT)
    yield made
    made.close()


def near_connections() -> list[Connection]:
    """The leader's ends of control, calls and groups; the far ones stay open."""
    ends = [connections() for _ in range(3)]
    FAR_ENDS.extend(far for _, far in ends)
    return [near for near, _ in ends]


FAR_ENDS: list[Connection] = []


def test_a_host_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    follower = Follower("the follower on Desk-2 (process 7)", *near_connections())
    monkeypatch.setattr(Listener, "wait_for_follower", lambda *given: follower)
    monkeypatch.setattr(LeaderSession, "_start_work", lambda *given: None)
    (port,) = free_ports(1)
    with caplog.at_level(logging.INFO):
        LeaderSession.start(SparkConfig(address="127.0.0.1", port=port), OFFER, None, EngineStatus(None)).close("done")
    assert "The follower on Desk-2 (process 7) joined." in caplog.messages


def test_a_callback_is_called_once(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it comes before the failure, after it, or in the same moment."""
    follower = Follower("the follower", *near_connections())
    interval = sys.getswitchinterval()
    monkeypatch.setattr(Listener, "close", lambda listener: None)
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            session = LeaderSession(SparkConfig(), listener, follower, EngineStatus(None))
            called: list[int] = []
            session.on_failure(partial(called.append, 0))
            failing = threading.Thread(target=session.fail, args=(PeerLostError("gone"),))
            failing.start()
            session.on_failure(partial(called.append, 1))
            failing.join(20)
            session.on_failure(partial(called.append, 2))
            assert sorted(called) == [0, 1, 2]
    finally:
        sys.setswitchinterval(interval)


def test_a_goodbye_counts_although_its_thread_comes_to_it_late(listener: Listener) -> None:
    """A busy machine runs the thread of the calls first, which finds its connection closed and no reason why."""
    (control, far_control), (calls, far_calls) = connections(), connections()
    groups, _far_groups = connections()
    session = LeaderSession(
        SparkConfig(), listener, Follower("the follower", control, calls, groups), EngineStatus(None)
    )
    far_control.send(Kind.LEAVE, to_json(Reason("it was stopped there")))
    far_calls.close()
    far_control.close()
    heartbeat = threading.Timer(1.5, session._heartbeat.start)
    heartbeat.start()
    with pytest.raises(PeerLostError, match=r"^the follower left: it was stopped there"), session.explained():
        calls.expect(Kind.REPLY, timeout=20)
    heartbeat.join()


def test_a_follower_that_writes_a_profile_or_loads_weights_may_be_silent(listener: Listener) -> None:
    """Until it has replied: torch holds the interpreter's lock meanwhile."""
    (calls, far_calls), (control, _far_control), (groups, _far_groups) = connections(), connections(), connections()
    session = LeaderSession(
        SparkConfig(), listener, Follower("the follower", control, calls, groups), EngineStatus(None)
    )
    for method, allowed in (("check_health", 0.0), ("profile", SILENT_SECONDS), (RELOAD_WEIGHTS, SILENT_SECONDS)):
        session.ask(method, (), {})
        assert session._heartbeat._tolerance() == allowed
        number = decode_header(far_calls.expect(Kind.QUERY, timeout=20).payload).number
        far_calls.send(Kind.REPLY, encode_result(None, number))
        assert session.answer(20) is None
        assert session._heartbeat._tolerance() == 0.0
    session.close("the test is over")


def test_nobody_waits_in_the_groups_of_a_broken_pair(listener: Listener) -> None:
    """For a follower that will not come: neither who waits already, nor who comes later."""
    session = LeaderSession(SparkConfig(), listener, Follower("the follower", *near_connections()), EngineStatus(None))
    store = PairStore(session.groups, LEADER_RANK)
    errors: list[Exception] = []

    def wait() -> None:
        try:
            store.wait(["a key of the follower"], timedelta(minutes=30))
        except Exception as error:
            errors.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive(), errors
    session.fail(PeerLostError("the follower is gone"))
    waiting.join(30)
    assert not waiting.is_alive()
    wait()
    assert len(errors) == 2
    for error in errors:
        assert isinstance(error, PeerLostError)
        assert str(error).startswith("the follower is gone; ")
    session.close("the test is over")
    assert "spark-groups" not in [thread.name for thread in threading.enumerate()]
