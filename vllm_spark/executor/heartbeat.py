"""The control lane's thread: signs of life, failures and goodbyes in both directions.

One thread owns the lane, because a TLS connection must not be read and written by two threads. Others hand it
messages with `say`.
"""

from __future__ import annotations

import contextlib
import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from vllm_spark.errors import PeerLeftError, PeerLostError, SparkError, described
from vllm_spark.executor.channel.framing import ChannelError, Frame, Kind, Lane, LaneClosedError
from vllm_spark.executor.handshake.messages import Reason, decode
from vllm_spark.processes.eventfd import WakeUp


class Silence:
    """The time since the peer's last sign of life, against the time that is allowed for it.

    Args:
        limit: seconds of silence after which the peer counts as dead once the model runs.
        starting_limit: the same until then.
        now: when the connection was made, which counts as a sign of life.
    """

    def __init__(self, limit: float, starting_limit: float, now: float) -> None:
        self._limit, self._starting_limit = limit, max(limit, starting_limit)
        self._heard = now
        self._running_since: float | None = None

    def end(self, now: float) -> None:
        """The peer gave a sign of life, or its silence proves nothing: this process itself was stopped."""
        self._heard = now

    def model_runs(self, now: float) -> None:
        """The shorter limit counts, and silence anew: before, the peer was allowed more. Only the first call counts."""
        if self._running_since is None:
            self._running_since = now

    def seconds(self, now: float) -> float:
        """For how long the peer has given no sign of life."""
        return now - self._heard

    def is_too_long(self, now: float, patience: float) -> bool:
        """Whether the peer counts as dead.

        Args:
            now: the present time.
            patience: seconds of silence that are allowed just now, if that is more than the limit.
        """
        return now >= self._deadline() and now - self._since() > patience

    def look_again_at(self, now: float, interval: float) -> float:
        """When `is_too_long` may next become true: at the limit; once that is over, whenever patience ends.

        Args:
            now: the present time.
            interval: seconds between two looks while there is patience.
        """
        deadline = self._deadline()
        return deadline if now < deadline else now + interval

    def _since(self) -> float:
        return self._heard if self._running_since is None else max(self._heard, self._running_since)

    def _deadline(self) -> float:
        return self._since() + (self._starting_limit if self._running_since is None else self._limit)


logger = logging.getLogger("vllm_spark")

STARTUP_TIMEOUT = 60.0
"""Seconds without a beat that are allowed before the first step: loading and compiling may hold Python's
interpreter lock for many seconds. Shorter heartbeat time-outs count only once the model runs."""

_CAUSE_GRACE = 0.5
_CLOSED_GRACE = 5.0

_BEATS_PER_TIMEOUT = 5
_LOOKS_PER_BEAT = 10  # at a silence that is over the limit and borne all the same, as while the link is out


def cause_grace(error: BaseException) -> float:
    """Seconds in which the control lane may explain an error that surfaced elsewhere first.

    Longer for the other lane's end. The control lane ends with it, so its thread comes to that, and to the goodbye
    before it, as soon as a busy machine runs it; only where one connection alone broke is it waited for in vain.
    """
    return _CLOSED_GRACE if isinstance(error, LaneClosedError) else _CAUSE_GRACE


class Pulse(threading.Thread):
    """Beats on the control lane and listens for the peer's beats until stopped.

    Args:
        lane: the control lane, owned by this thread from `start` on.
        timeout: seconds without a sign of life after which the peer counts as dead.
        report: called for every beat; the JSON-able object goes to the peer.
        on_report: called with the peer's object.
        on_end: called once, from this thread, when the common work is over, with the reason: PeerLostError if the
            peer died or froze, PeerLeftError after its goodbye, SparkError if the peer reported a failure.
        on_link: called with what the peer's runtime says of its rails.
        patience: how many seconds of silence are allowed just now, if that is more than `timeout`: a cable that is out
            silences the channel too, and the link has a time-out of its own.
    """

    def __init__(
        self,
        lane: Lane,
        timeout: float,
        report: Callable[[], Any],
        on_report: Callable[[Any], None],
        on_end: Callable[[SparkError], None],
        on_link: Callable[[bytes], None],
        patience: Callable[[], float],
    ) -> None:
        super().__init__(name="spark-pulse", daemon=True)
        self._lane, self._timeout = lane, timeout
        self._interval = timeout / _BEATS_PER_TIMEOUT
        self._report, self._on_report, self._on_end = report, on_report, on_end
        self._on_link, self._patience = on_link, patience
        self._outbox: deque[tuple[Kind, bytes]] = deque()
        self._wake = WakeUp()
        self._silence = Silence(timeout, STARTUP_TIMEOUT, time.monotonic())
        self._stopping = False

    def model_runs(self) -> None:
        """From now on the short heartbeat time-out counts, and silence anew: before, the peer was allowed more."""
        self._silence.model_runs(time.monotonic())

    def say(self, kind: Kind, message: msgspec.Struct) -> None:
        """Queues a message for the peer."""
        self._outbox.append((kind, msgspec.json.encode(message)))
        self._wake.ring()

    def announce(self, announcement: bytes) -> None:
        """Queues what this side's runtime says of its rails."""
        self._outbox.append((Kind.LINK, announcement))
        self._wake.ring()

    def stop(self, goodbye: Reason | None = None, timeout: float = 2.0) -> None:
        """Ends the thread, saying goodbye first if there is something to say; waits at most `timeout` seconds."""
        if goodbye is not None:
            self._outbox.append((Kind.GOODBYE, msgspec.json.encode(goodbye)))
        self._stopping = True
        self._wake.ring()
        if threading.current_thread() is self:
            # From `on_end`: the loop that would send what is queued has ended.
            with contextlib.suppress(ChannelError):
                self._flush()
        elif self.is_alive():
            self.join(timeout)
        else:
            self._wake.close()  # also of a thread that never ran

    def run(self) -> None:
        """The thread's loop."""
        try:
            self._run()
        finally:
            self._wake.close()

    def _run(self) -> None:
        try:
            end = self._beat_and_listen()
        except LaneClosedError as error:
            end = self._last_word() or error
        except SparkError as error:
            end = error
        except Exception as error:  # a bug here must end the work too, not only this thread
            logger.exception("The control thread failed.")
            end = SparkError(f"the control thread failed: {described(error)}")
        if end is not None and not self._stopping:
            self._on_end(end)

    def _beat_and_listen(self) -> SparkError | None:
        poll = select.poll()
        poll.register(self._lane.fileno(), select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        now = time.monotonic()
        next_beat, last_turn = now, now
        self._silence.end(now)
        while True:
            now = time.monotonic()
            if now - last_turn > 2 * self._interval:
                # This process itself was stopped or starved: the peer's silence proves nothing yet.
                self._silence.end(now)
            last_turn = now
            stopping = self._stopping  # read first: what was said before the stop is sent
            self._flush()
            if stopping:
                return None
            if now >= next_beat:
                self._lane.send(Kind.BEAT, msgspec.json.encode(self._report()), timeout=self._timeout)
                next_beat = now + self._interval
            if self._silence.is_too_long(now, self._patience()):
                raise PeerLostError(f"{self._lane.peer} gave no sign of life for {self._silence.seconds(now):.1f} s")
            next_turn = min(next_beat, self._silence.look_again_at(now, self._interval / _LOOKS_PER_BEAT))
            ready = [] if self._lane.pending else poll.poll(max(0.0, next_turn - now) * 1000)
            readable = self._lane.pending or self._lane.fileno() in [descriptor for descriptor, _ in ready]
            self._wake.hush()
            if readable:
                frame = self._lane.receive(timeout=max(self._timeout, self._patience()))
                self._silence.end(time.monotonic())
                if frame.kind is Kind.BEAT:
                    self._on_report(msgspec.json.decode(frame.payload))
                elif frame.kind is Kind.LINK:
                    self._on_link(frame.payload)
                elif (end := self._end_said_in(frame)) is not None:
                    return end
                else:
                    raise ChannelError(f"{self._lane.peer} sent {frame.kind.name} on the control lane")

    def _end_said_in(self, frame: Frame) -> SparkError | None:
        if frame.kind is Kind.GOODBYE:
            return PeerLeftError(f"{self._lane.peer} left: {decode(frame, Reason).sentence}")
        if frame.kind is Kind.FAILURE:
            reason = decode(frame, Reason)
            if reason.details:
                logger.error("%s failed:\n%s", self._lane.peer, reason.details)
            return SparkError(f"{self._lane.peer} failed: {reason.sentence}")
        return None

    def _last_word(self) -> SparkError | None:
        """What a peer said before it closed the lane.

        A beat to a lane that is closed fails at once, whatever still lies unread here.
        """
        with contextlib.suppress(ChannelError):
            while True:
                end = self._end_said_in(self._lane.receive(timeout=0.0))
                if end is not None:
                    return end
        return None

    def _flush(self) -> None:
        while self._outbox:
            kind, payload = self._outbox.popleft()
            self._lane.send(kind, payload, timeout=self._timeout)
