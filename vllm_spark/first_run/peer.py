"""The other machine of a first run: messages that both exchange, announcements about rails, and failures.

A thread reads the connection all the time, so that a failure of the other machine ends a wait within a collective too.
"""

from __future__ import annotations

import contextlib
import queue
import struct
import threading

from vllm_spark.collective import Announce, CollectiveError, Runtime
from vllm_spark.errors import EXIT_PROBLEM, PeerLostError, described
from vllm_spark.executor.channel.framing import Connection, Kind
from vllm_spark.executor.handshake.messages import Reason, decode_frame
from vllm_spark.records import to_json

STEP_SECONDS = 180.0
"""Limit for what the other machine does between two messages, collectives apart: those have their own."""

_SEND_SECONDS = 10.0
_FRAME_SECONDS = 30.0
"""Limit for the rest of a message that has begun to arrive."""

_POLL_SECONDS = 1.0
_NUMBER = struct.Struct("<I")


class PeerFailedError(PeerLostError):
    """A step failed on the other machine, or it was stopped there; the message has its sentence."""

    exit_code = EXIT_PROBLEM


class Peer:
    """The other end of `connection`, which this object owns from now on."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._state = threading.Lock()
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._runtime: Runtime | None = None
        self._announcement: bytes | None = None
        self._number = 0
        self._closing = False
        self._failure: PeerLostError | None = None
        self._stopped = ""
        self.name = connection.peer
        self._thread = threading.Thread(target=self._read, name="spark-first-run", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> PeerLostError | None:
        """Why the other machine cannot go on; None while it can."""
        return self._failure

    def exchange(self, mine: bytes) -> bytes:
        """Sends `mine`, and returns the other machine's message for the same step.

        Raises:
            PeerFailedError: the other machine has failed.
            PeerLostError: it is lost, or sent nothing for `STEP_SECONDS`.
        """
        self.check()
        self._send(Kind.EXCHANGE, mine)
        try:
            theirs = self._answers.get(timeout=STEP_SECONDS)
        except queue.Empty:
            raise PeerLostError(
                f"{self.name} sent nothing for {STEP_SECONDS:g} s; see what its program prints, and start both again"
            ) from None
        if theirs is None:
            self.check()
            raise PeerLostError(f"{self.name} closed the connection")
        return theirs

    def begin_runtime(self) -> Announce:
        """The `announce` of the next runtime; both machines open their runtimes in the same order.

        Announcements have the runtime's number: the last one of a runtime, which ends it on the other machine, may
        arrive when that has opened its next one.
        """
        with self._state:
            self._number += 1
            self._announcement = None
            number = _NUMBER.pack(self._number)
        return lambda announcement: self._send(Kind.LINK, number + announcement)

    def watch(self, runtime: Runtime) -> None:
        """Delivers announcements to `runtime`, and aborts it when the other machine fails, until `unwatch`."""
        with self._state:
            self._runtime = runtime
            pending, self._announcement = self._announcement, None
            failure = self._failure
        if pending is not None:
            runtime.deliver(pending)
        if failure is not None:
            runtime.abort(str(failure))

    def unwatch(self) -> None:
        """Forgets the runtime, before it is closed."""
        with self._state:
            self._runtime = None

    def check(self) -> None:
        """Raises the failure of the other machine, if there is one, or PeerLostError after `stop`."""
        if self._failure is not None:
            raise self._failure
        if self._stopped:
            raise PeerLostError(self._stopped)

    def fail(self, sentence: str) -> None:
        """Sends the other machine the reason why this one cannot go on; does nothing if it is lost."""
        with contextlib.suppress(PeerLostError):
            self._send(Kind.FAILURE, to_json(Reason(sentence)))

    def stop(self, name: str) -> None:
        """Ends what another thread waits for, and sends the other machine the name of the signal."""
        self._stopped = f"it was stopped here by {name}"
        self.fail(f"it was stopped there by {name}")
        with self._state:
            runtime = self._runtime
        self._abort(runtime, self._stopped)
        self._answers.put(None)

    def close(self) -> None:
        """Closes the connection, and ends the thread."""
        self._closing = True
        self._connection.interrupt()
        self._thread.join(_SEND_SECONDS)
        self._connection.close()

    def _send(self, kind: Kind, payload: bytes) -> None:
        with self._sending:
            self._connection.send(kind, payload, timeout=_SEND_SECONDS)

    def _read(self) -> None:
        try:
            while not self._closing:
                if not self._connection.wait(_POLL_SECONDS):
                    continue
                frame = self._connection.expect(Kind.EXCHANGE, Kind.LINK, Kind.FAILURE, timeout=_FRAME_SECONDS)
                if frame.kind is Kind.EXCHANGE:
                    self._answers.put(frame.payload)
                elif frame.kind is Kind.LINK:
                    self._deliver(frame.payload)
                else:
                    raise PeerFailedError(f"{self.name} failed: {decode_frame(frame, Reason).sentence}")
        except PeerLostError as error:
            self._end(error)
        except Exception as error:  # a fault of this program must end the waits of other threads, too
            sentence = f"a message of {self.name} could not be taken: {described(error)}; please report it"
            self._end(PeerLostError(sentence))
        finally:
            self._answers.put(None)

    def _end(self, failure: PeerLostError) -> None:
        """Ends what another thread waits for with this failure, unless it is due to `close`."""
        if self._closing:
            return
        with self._state:
            self._failure = failure
            runtime = self._runtime
        self._abort(runtime, str(failure))

    def _deliver(self, message: bytes) -> None:
        number, announcement = message[: _NUMBER.size], message[_NUMBER.size :]
        with self._state:
            if number != _NUMBER.pack(self._number):
                return
            runtime = self._runtime
            if runtime is None:
                self._announcement = announcement  # it replaces the one before
        if runtime is not None and not runtime.closed:
            runtime.deliver(announcement)

    @staticmethod
    def _abort(runtime: Runtime | None, reason: str) -> None:
        if runtime is not None and not runtime.closed:
            with contextlib.suppress(CollectiveError):
                runtime.abort(reason)
