"""Carries messages of torch's process groups and of their store over the pair's third authenticated connection.

torch would open a port for its store and others for gloo, unauthenticated, and unpickle what arrives there. Here both
travel over the groups lane: no port but the leader's is open, and a pair that breaks ends every wait at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from vllm_spark.errors import SparkError, described
from vllm_spark.executor.channel.framing import ChannelError, Kind, Lane
from vllm_spark.executor.heartbeat import cause_grace

if TYPE_CHECKING:  # it imports torch
    from vllm_spark.backend.process_group import Address

logger = logging.getLogger("vllm_spark")

_PIECE_BYTES = 4 << 20
_HEAD_BYTES = 4 << 10  # more than a piece has besides its data
_CLOSE_SECONDS = 5.0


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """A part of a message.

    Attributes:
        group, stream, number: the message's address.
        operation: what the sender runs, to be compared with what the receiver runs.
        total: length of the whole message in bytes.
        data: the next bytes of it.
    """

    group: str
    stream: str
    number: int
    operation: str
    total: int
    data: bytes


_decoder = msgspec.msgpack.Decoder(Piece)


class Message:
    """What has arrived of a message so far."""

    def __init__(self, operation: str, total: int) -> None:
        self.operation, self.total = operation, total
        self.data = bytearray()

    @property
    def complete(self) -> bool:
        """True once all of it has arrived."""
        return len(self.data) >= self.total


class GroupLink:
    """One rank's end of the groups lane. Its methods may be called from any thread.

    Args:
        lane: the groups lane, owned by this object from here on; a thread of its own receives from it.
        end_work: ends the work of this rank, for a reason that nobody who waits here would see. Called from any thread,
            from the receiving one too if that has to end before `fail` or `close` is called.
    """

    def __init__(self, lane: Lane, end_work: Callable[[SparkError], None]) -> None:
        self._lane, self.end_work = lane, end_work
        self._arrival = threading.Condition()
        self._mail: dict[Address, Message] = {}
        self._handlers: dict[str, Callable[[int, Message], None]] = {}
        self._failure: SparkError | None = None
        self._ended = threading.Event()  # whoever owns this object knows that its work is over
        self._send_lock = threading.Lock()
        self._receiver = threading.Thread(target=self._receive, name="spark-groups", daemon=True)
        self._receiver.start()

    @property
    def peer(self) -> str:
        """How to name the other side in messages."""
        return self._lane.peer

    def send(self, address: Address, operation: str, data: bytes) -> None:
        """Sends one message, in pieces.

        Raises:
            SparkError: the pair is broken.
        """
        step = min(_PIECE_BYTES, self._lane.max_frame - _HEAD_BYTES)
        for begin in range(0, max(len(data), 1), step):
            piece = Piece(*address, operation, len(data), data[begin : begin + step])
            payload = msgspec.msgpack.encode(piece)
            with self._send_lock:
                self._raise_failure()
                self._lane.send(Kind.GROUP, payload)

    def take(self, address: Address, operation: str, timeout: float) -> bytearray:
        """Waits for a message, and removes it.

        Raises:
            TimeoutError: it has not come within `timeout` seconds.
            SparkError: the pair is broken, or the other rank runs another operation.
        """
        end = time.monotonic() + timeout
        with self._arrival:
            while not self._has(address):
                self._raise_failure()
                remaining = end - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError(f"{self.peer} sent nothing for {timeout:g} s")
                self._arrival.wait(remaining)
            message = self._mail.pop(address)
        if message.operation != operation:
            raise ChannelError(
                f"operation {address[2]} of process group {address[0]} is {operation} here and "
                f"{message.operation} on the other side ({self.peer})"
            )
        return message.data

    def has(self, address: Address) -> bool:
        """True if a message has arrived as a whole, or never will: `take` returns or raises without a wait."""
        with self._arrival:
            return self._has(address) or self._failure is not None

    def deliver(self, address: Address, operation: str, data: bytes) -> None:
        """Puts a message of this rank to itself where `take` finds it."""
        message = Message(operation, len(data))
        message.data += data
        with self._arrival:
            self._mail[address] = message
            self._arrival.notify_all()

    def handle(self, stream: str, handler: Callable[[int, Message], None]) -> None:
        """From now on `handler` gets the messages of `stream`, in the receiving thread: it must not wait."""
        with self._arrival:
            self._handlers[stream] = handler
            waiting = sorted(address for address in self._mail if address[1] == stream and self._has(address))
            messages = [(address[2], self._mail.pop(address)) for address in waiting]
        for number, message in messages:
            handler(number, message)

    def fail(self, reason: SparkError) -> None:
        """Ends every wait, and every later one, with the first `reason` that is given; and the connection."""
        self._fail(reason)
        self._ended.set()
        self._lane.interrupt()

    def close(self, reason: SparkError) -> None:
        """As `fail`; also ends the receiving thread and closes the socket. May be called again."""
        self.fail(reason)
        if threading.current_thread() is not self._receiver:
            self._receiver.join(_CLOSE_SECONDS)
        self._lane.close()

    def _has(self, address: Address) -> bool:
        message = self._mail.get(address)
        return message is not None and message.complete

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)

    def _fail(self, reason: SparkError) -> None:
        with self._arrival:
            if self._failure is None:
                self._failure = reason
            self._arrival.notify_all()

    def _receive(self) -> None:
        try:
            while True:
                self._accept(_decoder.decode(self._lane.expect(Kind.GROUP).payload))
        except msgspec.MsgspecError as error:
            reason: SparkError = ChannelError(
                f"{self.peer} sent a message of a process group that cannot be read: {error}"
            )
        except SparkError as error:
            reason = error
        except Exception as error:
            logger.exception("The thread of the process groups failed.")
            reason = SparkError(f"the thread of the process groups failed: {described(error)}")
        self._fail(reason)
        # Nothing is received from here on, so the work ends also if nobody waits now. A connection that ended is often
        # a symptom: the control lane may know the cause, and then this object is told.
        if not self._ended.wait(cause_grace(reason)):
            self.end_work(reason)

    def _accept(self, piece: Piece) -> None:
        address = piece.group, piece.stream, piece.number
        with self._arrival:
            message = self._mail.setdefault(address, Message(piece.operation, piece.total))
            message.data += piece.data
            if not message.complete:
                return
            handler = self._handlers.get(piece.stream)
            if handler is not None:
                del self._mail[address]
            self._arrival.notify_all()
        if handler is not None:
            handler(piece.number, message)
