"""The heartbeat between the two ranks, on the control connection, and what else that connection carries.

`Heartbeat` is the one thread that uses the connection: it sends and expects heartbeats, and sends what other threads
queue (a failure, the reason for an end, announcements of the runtime). `cause_grace` tells those threads how long to
wait for the control connection to report the cause of an error of theirs. `Silence` decides when the peer is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import Field

from vllm_spark.backend.pair_status.records import Readings
from vllm_spark.backend.status import RankCounters
from vllm_spark.errors import PeerLeftError, PeerLostError, SparkError, described
from vllm_spark.executor.channel.framing import ChannelError, Connection, ConnectionClosedError, Frame, Kind
from vllm_spark.executor.handshake.messages import Reason, decode_frame
from vllm_spark.processes.eventfd import EventFd
from vllm_spark.records import to_json

logger = logging.getLogger("vllm_spark")

Report = TypeVar("Report")

STARTUP_TIMEOUT = 60.0
"""Seconds without a heartbeat that are allowed before the first step: loading and compiling may hold Python's
interpreter lock for many seconds. Shorter heartbeat time-outs apply only once the model runs."""

_CAUSE_GRACE = 0.5
_CLOSED_GRACE = 5.0

_HEARTBEATS_PER_TIMEOUT = 5
_CHECKS_PER_HEARTBEAT = 10  # of a silence that is over the limit and tolerated, as while the link is down


def cause_grace(error: BaseException) -> float:
    """Seconds in which the control connection may report the cause of an error that surfaced elsewhere first.

    Longer if another connection was closed: the peer closes all of them together, so the control thread gets the reason
    as soon as a busy machine schedules it. The wait is in vain only if one connection alone broke.
    """
    return _CLOSED_GRACE if isinstance(error, ConnectionClosedError) else _CAUSE_GRACE


@dataclasses.dataclass(frozen=True)
class LeaderReport:
    """A leader's heartbeat.

    Attributes:
        step: its steps so far.
        digest: of what they sampled, in hexadecimal digits.
        start_step: the step of vLLM's start in which it is (`start_step.step_of`).
    """

    step: int
    digest: Annotated[str, Field(pattern="^([0-9a-f]{2})*$")]
    start_step: str = ""


@dataclasses.dataclass(frozen=True)
class FollowerReport:
    """A follower's heartbeat.

    Attributes:
        counters: of its rank.
        failed_call: why the last QUERY failed; empty if it did not.
        failed_number: the number of that QUERY.
        answered: the number of the last QUERY that it has finished.
        start_step: the step of vLLM's start in which it is (`start_step.step_of`).
        readings: of its machine.
    """

    counters: RankCounters
    failed_call: str
    failed_number: int
    answered: int = 0
    start_step: str = ""
    readings: Readings = dataclasses.field(default_factory=Readings)


class Heartbeat(threading.Thread):
    """Sends heartbeats on the control connection, and receives the peer's, until stopped.

    One thread owns the connection, because a TLS connection must not be read and written by two threads. Others queue
    messages with `send`.

    Args:
        connection: the control connection, owned by this thread from `start` on.
        timeout: seconds without a frame after which the peer counts as lost.
        report: called for every heartbeat; returns the record that is sent to the peer.
        peer_report: the type of the peer's record.
        on_report: called with the peer's record.
        on_end: called once, from this thread, when the session is over, with the reason: PeerLostError if the peer
            died or froze, PeerLeftError if it left in order, SparkError if it reported a failure.
        on_link: called with the announcements of the peer's runtime about its rails.
        tolerance: how many seconds of silence are allowed just now, if that is more than `timeout`: a cable that is
            unplugged silences the channel too, and the link has a time-out of its own.
    """

    def __init__(
        self,
        connection: Connection,
        timeout: float,
        report: Callable[[], Any],
        peer_report: type[Report],
        on_report: Callable[[Report], None],
        on_end: Callable[[SparkError], None],
        on_link: Callable[[bytes], None],
        tolerance: Callable[[], float],
    ) -> None:
        super().__init__(name="spark-heartbeat", daemon=True)
        self._connection, self._timeout = connection, timeout
        self._interval = timeout / _HEARTBEATS_PER_TIMEOUT
        self._report, self._on_end = report, on_end
        self._peer_report: type[Any] = peer_report
        self._on_report: Callable[[Any], None] = on_report
        self._on_link, self._tolerance = on_link, tolerance
        self._outbox: deque[tuple[Kind, bytes]] = deque()
        self._queued = EventFd()
        self._silence = Silence(timeout, STARTUP_TIMEOUT, time.monotonic())
        self._stopping = False

    def model_started(self) -> None:
        """From now on the heartbeat time-out applies, counted anew: before, the peer was allowed more."""
        self._silence.model_started(time.monotonic())

    def send(self, kind: Kind, message: Any) -> None:
        """Queues a message for the peer."""
        self._outbox.append((kind, to_json(message)))
        self._queued.set()

    def announce(self, announcement: bytes) -> None:
        """Queues an announcement of this side's runtime about its rails."""
        self._outbox.append((Kind.LINK, announcement))
        self._queued.set()

    def stop(self, reason: Reason | None = None, timeout: float = 2.0) -> None:
        """Ends the thread, after sending a LEAVE frame if there is a `reason`; waits at most `timeout` seconds."""
        if reason is not None:
            self._outbox.append((Kind.LEAVE, to_json(reason)))
        self._stopping = True
        self._queued.set()
        if threading.current_thread() is self:
            # From `on_end`: the loop that would send what is queued has ended.
            with contextlib.suppress(ChannelError):
                self._flush()
        elif self.is_alive():
            self.join(timeout)
        else:
            self._queued.close()  # also of a thread that never ran

    def run(self) -> None:
        """The thread's loop."""
        try:
            self._run()
        finally:
            self._queued.close()

    def _run(self) -> None:
        try:
            end = self._exchange_heartbeats()
        except ConnectionClosedError as error:
            end = self._pending_reason() or error
        except SparkError as error:
            end = error
        except Exception as error:  # a bug here must end the session too, not only this thread
            logger.exception("The control thread failed.")
            end = SparkError(f"the control thread failed: {described(error)}")
        if end is not None and not self._stopping:
            self._on_end(end)

    def _exchange_heartbeats(self) -> SparkError | None:
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLIN)
        poll.register(self._queued, select.POLLIN)
        now = time.monotonic()
        next_heartbeat, last_turn = now, now
        self._silence.reset(now)
        while True:
            now = time.monotonic()
            if now - last_turn > 2 * self._interval:
                # This process itself was stopped or not scheduled: the peer's silence proves nothing yet.
                self._silence.reset(now)
            last_turn = now
            stopping = self._stopping  # read first: what was queued before the stop is sent
            self._flush()
            if stopping:
                return None
            if now >= next_heartbeat:
                self._connection.send(Kind.HEARTBEAT, to_json(self._report()), timeout=self._timeout)
                next_heartbeat = now + self._interval
            if self._silence.expired(now, self._tolerance()):
                raise PeerLostError(f"{self._connection.peer} sent no heartbeat for {self._silence.seconds(now):.1f} s")
            next_turn = min(next_heartbeat, self._silence.next_check(now, self._interval / _CHECKS_PER_HEARTBEAT))
            ready = [] if self._connection.pending else poll.poll(max(0.0, next_turn - now) * 1000)
            readable = self._connection.pending or self._connection.fileno() in [descriptor for descriptor, _ in ready]
            self._queued.clear()
            if readable:
                frame = self._connection.receive(timeout=max(self._timeout, self._tolerance()))
                self._silence.reset(time.monotonic())
                if frame.kind is Kind.HEARTBEAT:
                    self._on_report(decode_frame(frame, self._peer_report))
                elif frame.kind is Kind.LINK:
                    self._on_link(frame.payload)
                elif (end := self._end_in(frame)) is not None:
                    return end
                else:
                    raise ChannelError(f"{self._connection.peer} sent {frame.kind.name} on the control connection")

    def _end_in(self, frame: Frame) -> SparkError | None:
        """The end of the session that `frame` reports; None if it reports none."""
        if frame.kind is Kind.LEAVE:
            return PeerLeftError(f"{self._connection.peer} left: {decode_frame(frame, Reason).sentence}")
        if frame.kind is Kind.FAILURE:
            reason = decode_frame(frame, Reason)
            if reason.details:
                logger.error("%s failed:\n%s", self._connection.peer, reason.details)
            return SparkError(f"{self._connection.peer} failed: {reason.sentence}")
        return None

    def _pending_reason(self) -> SparkError | None:
        """The reason that a peer sent before it closed the connection.

        A heartbeat to a closed connection fails at once, even if unread frames are still buffered here.
        """
        with contextlib.suppress(ChannelError):
            while True:
                end = self._end_in(self._connection.receive(timeout=0.0))
                if end is not None:
                    return end
        return None

    def _flush(self) -> None:
        while self._outbox:
            kind, payload = self._outbox.popleft()
            self._connection.send(kind, payload, timeout=self._timeout)


class Silence:
    """The time since the peer's last frame, against the time that is allowed.

    Args:
        limit: seconds of silence after which the peer counts as lost once the model runs.
        starting_limit: the same until then.
        now: when the connection was made, which counts as a frame.
    """

    def __init__(self, limit: float, starting_limit: float, now: float) -> None:
        self._limit, self._starting_limit = limit, max(limit, starting_limit)
        self._last_frame = now
        self._running_since: float | None = None

    def reset(self, now: float) -> None:
        """A frame came, or the silence proves nothing: this process itself was stopped."""
        self._last_frame = now

    def model_started(self, now: float) -> None:
        """The shorter limit applies from `now` on; only the first call counts."""
        if self._running_since is None:
            self._running_since = now

    def seconds(self, now: float) -> float:
        """Seconds since the peer's last frame."""
        return now - self._last_frame

    def expired(self, now: float, tolerance: float) -> bool:
        """Whether the peer counts as lost.

        Args:
            now: the present time.
            tolerance: seconds of silence that are allowed just now, if that is more than the limit.
        """
        return now >= self._deadline() and now - self._since() > tolerance

    def next_check(self, now: float, interval: float) -> float:
        """When `expired` may next become true: at the limit; once that is over, whenever the tolerance ends.

        Args:
            now: the present time.
            interval: seconds between two checks while the silence is tolerated.
        """
        deadline = self._deadline()
        return deadline if now < deadline else now + interval

    def _since(self) -> float:
        return self._last_frame if self._running_since is None else max(self._last_frame, self._running_since)

    def _deadline(self) -> float:
        return self._since() + (self._starting_limit if self._running_since is None else self._limit)
