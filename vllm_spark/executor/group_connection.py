"""The groups connection: carries messages of torch's process groups and of their store, authenticated.

torch would open one port for its store and others for gloo, unauthenticated, and unpickle the data that arrives there.
Over this connection no port but the leader's is open, and the end of the session ends every wait at once.
"""

from __future__ import annotations

import dataclasses
import logging
import struct
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import NonNegativeInt

from vllm_spark.errors import SparkError, described
from vllm_spark.executor.channel.framing import ChannelError, Connection, Kind
from vllm_spark.executor.heartbeat import cause_grace
from vllm_spark.records import RecordError, from_json, to_json

if TYPE_CHECKING:  # it imports torch
    from vllm_spark.backend.process_group import Address

logger = logging.getLogger("vllm_spark")

_PIECE_BYTES = 4 << 20
_HEAD_BYTES = 4 << 10  # more than a piece has besides its data
_HEAD_LENGTH = struct.Struct("<I")
_CLOSE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Head:
    """The head of a piece, which is a part of a message: the length of the head, the head as JSON, the next bytes.

    Attributes:
        group, stream, number: the message's address.
        operation: what the sender runs, to be compared with what the receiver runs.
        total: length of the whole message in bytes.
    """

    group: str
    stream: str
    number: NonNegativeInt
    operation: str
    total: NonNegativeInt


def encode_piece(head: Head, data: bytes | memoryview) -> bytes:
    """The payload of a GROUP frame."""
    encoded = to_json(head)
    return b"".join((_HEAD_LENGTH.pack(len(encoded)), encoded, data))


def decode_piece(payload: bytes) -> tuple[Head, memoryview]:
    """A piece's head and its bytes.

    Raises:
        RecordError: the payload is not a piece.
    """
    if len(payload) < _HEAD_LENGTH.size:
        raise RecordError(f"a piece of {len(payload)} bytes is shorter than the length of its head")
    (length,) = _HEAD_LENGTH.unpack_from(payload)
    end = _HEAD_LENGTH.size + length
    if end > len(payload):
        raise RecordError(f"a head of {length} bytes in a piece of {len(payload)} bytes")
    return from_json(payload[_HEAD_LENGTH.size : end], Head), memoryview(payload)[end:]


class Message:
    """The part of a message that has arrived so far."""

    def __init__(self, operation: str, total: int) -> None:
        self.operation, self.total = operation, total
        self.data = bytearray()

    @property
    def complete(self) -> bool:
        """True once all of it has arrived."""
        return len(self.data) >= self.total


class GroupConnection:
    """One rank's end of the groups connection, with a receiving thread. Its methods may be called from any thread.

    Args:
        connection: the groups connection, owned by this object from here on; a thread of its own receives from it.
        end_session: ends the session on this rank if the connection is lost while no caller waits for a message. Called
            from any thread, from the receiving one too if that ends before `fail` or `close` is called.
    """

    def __init__(self, connection: Connection, end_session: Callable[[SparkError], None]) -> None:
        self._connection, self.end_session = connection, end_session
        self._arrival = threading.Condition()
        self._messages: dict[Address, Message] = {}
        self._handlers: dict[str, Callable[[int, Message], None]] = {}
        self._failure: SparkError | None = None
        self._ended = threading.Event()  # set once the owner knows that the session is over
        self._send_lock = threading.Lock()
        self._receiver = threading.Thread(target=self._receive, name="spark-groups", daemon=True)
        self._receiver.start()

    @property
    def peer(self) -> str:
        """The other side's name in messages."""
        return self._connection.peer

    def send(self, address: Address, operation: str, data: bytes) -> None:
        """Sends one message, in pieces.

        Raises:
            SparkError: the session is over.
        """
        head = Head(*address, operation, len(data))
        step = min(_PIECE_BYTES, self._connection.max_frame - _HEAD_BYTES)
        for begin in range(0, max(len(data), 1), step):
            payload = encode_piece(head, memoryview(data)[begin : begin + step])
            with self._send_lock:
                self._raise_failure()
                self._connection.send(Kind.GROUP, payload)

    def take(self, address: Address, operation: str, timeout: float) -> bytearray:
        """Waits for a message, and removes it.

        Raises:
            TimeoutError: it has not come within `timeout` seconds.
            SparkError: the session is over, or the other rank runs another operation.
        """
        end = time.monotonic() + timeout
        with self._arrival:
            while not self._has(address):
                self._raise_failure()
                remaining = end - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError(f"{self.peer} sent nothing for {timeout:g} s")
                self._arrival.wait(remaining)
            message = self._messages.pop(address)
        if message.operation != operation:
            raise ChannelError(
                f"operation {address[2]} of process group {address[0]} is {operation} here and "
                f"{message.operation} on the other side ({self.peer})"
            )
        return message.data

    def has(self, address: Address) -> bool:
        """True if a message has arrived completely, or never will: `take` returns or raises without a wait."""
        with self._arrival:
            return self._has(address) or self._failure is not None

    def deliver(self, address: Address, operation: str, data: bytes) -> None:
        """Stores a message from this rank to itself, for `take`."""
        message = Message(operation, len(data))
        message.data += data
        with self._arrival:
            self._messages[address] = message
            self._arrival.notify_all()

    def handle(self, stream: str, handler: Callable[[int, Message], None]) -> None:
        """From now on `handler` is called with the messages of `stream`, in the receiving thread: it must not block."""
        with self._arrival:
            self._handlers[stream] = handler
            waiting = sorted(address for address in self._messages if address[1] == stream and self._has(address))
            messages = [(address[2], self._messages.pop(address)) for address in waiting]
        for number, message in messages:
            handler(number, message)

    def fail(self, reason: SparkError) -> None:
        """Ends the connection, and every wait now and later, with the first `reason` that is given."""
        self._fail(reason)
        self._ended.set()
        self._connection.interrupt()

    def close(self, reason: SparkError) -> None:
        """As `fail`; also ends the receiving thread and closes the socket. May be called again."""
        self.fail(reason)
        if threading.current_thread() is not self._receiver:
            self._receiver.join(_CLOSE_SECONDS)
        self._connection.close()

    def _has(self, address: Address) -> bool:
        message = self._messages.get(address)
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
                self._accept(*decode_piece(self._connection.expect(Kind.GROUP).payload))
        except RecordError as error:
            reason: SparkError = ChannelError(
                f"{self.peer} sent a message of a process group that cannot be read: {error}"
            )
        except SparkError as error:
            reason = error
        except Exception as error:
            logger.exception("The thread of the process groups failed.")
            reason = SparkError(f"the thread of the process groups failed: {described(error)}")
        self._fail(reason)
        # Nothing is received from here on, so the session ends even if no caller waits now. A closed connection is
        # often a symptom: if the control connection reports the cause, the owner calls `fail`.
        if not self._ended.wait(cause_grace(reason)):
            self.end_session(reason)

    def _accept(self, head: Head, data: memoryview) -> None:
        address = head.group, head.stream, head.number
        with self._arrival:
            message = self._messages.setdefault(address, Message(head.operation, head.total))
            length = len(message.data) + len(data)
            if length > message.total:
                raise RecordError(f"{length} bytes of a message of {message.total} bytes")
            message.data += data
            if not message.complete:
                return
            handler = self._handlers.get(head.stream)
            if handler is not None:
                del self._messages[address]
            self._arrival.notify_all()
        if handler is not None:
            handler(head.number, message)
