"""The offset between two clocks: with planted offsets, delays and drift, and over a real channel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spark.backend.status import EngineStatus
from vllm_spark.config.settings import SparkConfig
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.framing import Kind
from vllm_spark.executor.handshake.server import Follower, Listener
from vllm_spark.executor.leader_session import LeaderSession
from vllm_spark.executor.rpc import decode_call, decode_header, encode_result
from vllm_spark.executor.tracing import follower
from vllm_spark.recording.clock_offset import ClockOffset, LeaderClock, RoundTrip, estimate

from .test_channel import LIMIT, SECRET, connections

DELAYS = st.integers(0, 10**7)


@settings(deadline=None)
@given(
    st.integers(-(10**15), 10**15),
    st.lists(st.tuples(st.integers(0, 10**9), DELAYS, DELAYS, DELAYS), min_size=1, max_size=20),
)
def test_the_true_offset_is_within_the_bound(offset: int, trips: list[tuple[int, int, int, int]]) -> None:
    """However unequal both directions are."""
    made = [
        RoundTrip(sent, sent + there + offset, sent + there + inside + offset, sent + there + inside + back)
        for sent, there, inside, back in trips
    ]
    found = estimate(made)
    assert abs(found.offset - offset) <= found.uncertainty
    assert found.uncertainty <= min(there + back for _, there, _, back in trips) // 2 + 2
    assert found.round_trips == len(trips)


def test_clocks_that_drift_are_compared_twice() -> None:
    clock = LeaderClock(ClockOffset(0, 1000, 5, 1), ClockOffset(10**9, 51_000, 7, 1))
    assert clock.drift_ppm == pytest.approx(50)
    assert clock.uncertainty == 7
    for leader in (0, 5 * 10**8, 10**9):
        shown = leader + 1000 + round(50e-6 * leader)
        assert abs(clock.time(shown) - leader) <= 3


@pytest.mark.parametrize("planted", [0, 123_456_789_000, -987_654_321_000])
def test_a_planted_offset_is_found_over_the_channel(planted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (control, _), (calls, far_calls), (groups, _) = connections(), connections(), connections()
    listener = Listener("127.0.0.1", 0, tls_context(SECRET, "leader"), LIMIT)
    session = LeaderSession(
        SparkConfig(), listener, Follower("the follower", control, calls, groups), EngineStatus(None)
    )

    def follow() -> None:
        payload = far_calls.expect(Kind.QUERY, timeout=20).payload
        (count,) = decode_call(payload).args
        follower.answer_clock(far_calls, count)
        far_calls.send(Kind.REPLY, encode_result(None, decode_header(payload).number))

    monkeypatch.setattr(follower, "time", _Clock(planted))
    thread = threading.Thread(target=follow)
    thread.start()
    try:
        found = estimate(session.compare_clocks(100))
        thread.join(20)
        assert not thread.is_alive()
    finally:
        session.close("the test ends")
    print(found)
    assert found.round_trips == 100
    assert abs(found.offset - planted) <= found.uncertainty
    assert found.uncertainty < 5_000_000


class _Clock:
    """Stands for the module `time` of another machine."""

    def __init__(self, offset: int) -> None:
        self.monotonic_ns: Callable[[], int] = lambda: time.monotonic_ns() + offset
