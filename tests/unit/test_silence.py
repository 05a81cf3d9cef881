"""The limit of a peer's silence holds, whenever a rank's own heartbeats make it look."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_spark.errors import PeerLostError, SparkError
from vllm_spark.executor.channel.framing import Kind
from vllm_spark.executor.heartbeat import Heartbeat, Silence

from .test_channel import connections, wait_for

LIMIT, STARTING, INTERVAL = 5.0, 60.0, 1.0


def lost_at(silence: Silence, now: float, tolerance: float = 0.0) -> float:
    """When a rank that looks at its own heartbeats, and when it is told to, counts the peer as dead."""
    next_beat = now
    while not silence.expired(now, tolerance):
        if now >= next_beat:
            next_beat = now + INTERVAL
        again = min(next_beat, silence.next_check(now, INTERVAL / 10))
        assert again > now, "time goes on"
        now = again
    return now


@given(phase=st.floats(0.001, 0.999), start=st.floats(0.0, 1e6))
def test_the_limit_counts_from_the_last_frame(phase: float, start: float) -> None:
    silence = Silence(LIMIT, STARTING, start)
    silence.model_started(start)
    silence.reset(start + phase)
    assert lost_at(silence, start + phase) == pytest.approx(start + phase + LIMIT)
    assert silence.seconds(start + phase + LIMIT) == pytest.approx(LIMIT)


@given(phase=st.floats(0.001, 0.999))
def test_a_start_has_a_longer_limit(phase: float) -> None:
    silence = Silence(LIMIT, STARTING, 0.0)
    silence.reset(phase)
    assert lost_at(silence, phase) == pytest.approx(phase + STARTING)
    silence.model_started(50.0)
    silence.model_started(59.0)  # a second call changes nothing
    assert lost_at(silence, 59.0) == 59.0
    assert not silence.expired(54.9, 0.0)
    assert silence.expired(55.0, 0.0)


@given(tolerance=st.floats(0.0, 30.0), phase=st.floats(0.001, 0.999))
def test_tolerance_is_the_longer_one(tolerance: float, phase: float) -> None:
    silence = Silence(LIMIT, STARTING, 0.0)
    silence.model_started(0.0)
    silence.reset(phase)
    noticed = lost_at(silence, phase, tolerance) - phase
    assert (
        noticed == pytest.approx(LIMIT)
        if tolerance < LIMIT
        else tolerance < noticed <= tolerance + INTERVAL / 10 + 1e-6
    )


def test_a_rank_looks_when_the_limit_is_over_and_not_at_its_next_heartbeat() -> None:
    """Five tries: a busy machine may run the thread late, but not each time."""
    limit, beats_per_limit = 2.0, 5
    late = []
    for _ in range(5):
        late.append(lateness(limit, beats_per_limit))
        if late[-1] < limit / beats_per_limit / 4:
            return
    pytest.fail(f"noticed {', '.join(f'{seconds:.2f}' for seconds in late)} s after the limit of {limit} s")


def lateness(limit: float, beats_per_limit: int) -> float:
    """Seconds after the limit until a rank whose peer is silent counts it as dead."""
    left, right = connections()
    sent: list[float] = []
    ends: list[tuple[float, SparkError]] = []
    heartbeat = Heartbeat(
        right,
        limit,
        report=lambda: sent.append(time.monotonic()),
        peer_report=object,
        on_report=lambda _: None,
        on_end=lambda error: ends.append((time.monotonic(), error)),
        on_link=lambda _: None,
        tolerance=lambda: 0.0,
    )
    heartbeat.start()
    heartbeat.model_started()
    wait_for(lambda: sent, "this side's beat")
    time.sleep(limit / beats_per_limit / 4)  # so that the limit ends long before one of its beats
    last = time.monotonic()
    left.send(Kind.HEARTBEAT, b"null")
    wait_for(lambda: ends, "the end")
    at, error = ends[0]
    left.close()
    assert isinstance(error, PeerLostError)
    assert at - last > limit - 0.01, "not before the limit"
    return at - last - limit
