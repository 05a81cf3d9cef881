"""Framed, authenticated messages between the leader and its follower.

A `Connection` is a TLS connection that carries frames: a header of kind and length, then the payload. A session has
three: *rpc* (worker calls and their replies, used by the thread that runs the model), *control* (heartbeats, failures,
the reason for an end; used by a thread of its own) and *groups* (messages of torch's process groups). While files of a
model are copied it has further ones, named *copy*. A connection is used by one thread at a time, or by one that sends
and another that receives.
"""

from __future__ import annotations

import enum
import select
import ssl
import struct
import time
from typing import NamedTuple

from vllm_spark.config.settings import flag_name
from vllm_spark.errors import PeerLostError, SparkError, without_stop
from vllm_spark.executor.channel.tls import TlsConnection

MIB = 1 << 20
_HEADER = struct.Struct("<BxxxI")


class Kind(enum.IntEnum):
    """The kind of a frame."""

    HELLO = 1
    """JSON: who connects, with which versions, and which of the connections this is."""
    WELCOME = 2
    """JSON: the connection was accepted."""
    REFUSAL = 3
    """JSON: why the connection was not accepted."""
    OFFER = 4
    """JSON: the model that the leader serves."""
    ACCEPTANCE = 5
    """Empty: the follower has that model."""
    ASSIGNMENT = 6
    """Pickle: configuration and environment of the follower's worker."""
    EXCHANGE = 7
    """Bytes: one side's half of a collective rendezvous."""
    CALL = 8
    """A worker call, without a reply."""
    QUERY = 9
    """A worker call that is answered by a REPLY."""
    REPLY = 10
    """Pickle: the outcome of a QUERY."""
    HEARTBEAT = 11
    """JSON: a heartbeat, with the sender's counters."""
    FAILURE = 12
    """JSON: the sender cannot go on, and why."""
    LEAVE = 13
    """JSON: the sender ends the session in order, and why."""
    LINK = 14
    """Bytes: an announcement of the sender's collective runtime about its rails."""
    CHECK_REQUEST = 15
    """JSON: sent by `vllm-spark doctor` in place of an OFFER: it asks for a check of the follower's machine."""
    CHECK_REPORT = 16
    """JSON: the result of that check."""
    GROUP = 17
    """JSON, then bytes: a part of a message of torch's process groups or of their store."""
    PROGRESS = 18
    """JSON: what the follower is doing before it answers an OFFER."""
    RESTART = 19
    """Empty, in answer to an OFFER: the follower reconnects from another process, with the leader's environment."""
    COPY_LIST = 20
    """JSON: asks for the list of files of a model, an adapter or a tokenizer."""
    COPY_FILES = 21
    """JSON: that list."""
    COPY_RANGE = 22
    """JSON: asks for a range of one of those files."""
    COPY_DATA = 23
    """Bytes: a piece of that range."""
    COPY_END = 24
    """Empty: the range is complete, and its file was not changed meanwhile."""
    SEARCH = 25
    """JSON: sent by a leader in place of an OFFER: what it does not have and asks its follower for."""
    FOUND = 26
    """JSON: which of that the follower has."""
    SEND = 27
    """JSON: how many copy connections the follower is to open, to send what it has."""
    CLOCK = 28
    """Empty from the leader; the follower answers with the times of its clock, to compare both."""


class Frame(NamedTuple):
    """One message on a connection."""

    kind: Kind
    payload: bytes


class FrameTooLargeError(SparkError):
    """A message that this side wants to send is longer than the limit."""


class ChannelError(PeerLostError):
    """The connection is unusable: closed, timed out, or the peer does not speak the protocol."""


class ConnectionClosedError(ChannelError):
    """The peer closed the connection, or it broke. The control connection may carry the reason."""


class Connection:
    """One authenticated connection that carries frames.

    Args:
        tls: an established TLS connection, owned by the connection from here on.
        peer: the other side's name in messages.
        max_frame: largest payload accepted, in bytes; checked before anything is allocated.
    """

    def __init__(self, tls: TlsConnection, peer: str, max_frame: int) -> None:
        self._tls = tls
        self.max_frame = max_frame
        self.peer = peer
        self._interrupted = False  # by KeyboardInterrupt, say, in the middle of a frame

    @property
    def peer_role(self) -> str:
        """The role that the peer authenticated as."""
        return self._tls.peer_name

    @property
    def peer_address(self) -> str:
        """The IP address of the peer.

        Raises:
            ConnectionClosedError: the peer is gone.
        """
        try:
            return self._tls.peer_address
        except OSError as error:
            raise ConnectionClosedError(f"{self.peer} cannot be reached any more: {_reason(error)}") from None

    def fileno(self) -> int:
        """The socket's descriptor, for poll; -1 once closed."""
        return self._tls.fileno()

    @property
    def pending(self) -> bool:
        """True if bytes are buffered here, which poll does not show."""
        return self._tls.pending

    def disable_keepalive(self) -> None:
        """Turns TCP keepalive off: from now on the heartbeat alone detects a peer that is gone."""
        self._tls.set_keepalive(False)

    def send(self, kind: Kind, payload: bytes = b"", *, timeout: float | None = None) -> None:
        """Sends one frame.

        Raises:
            FrameTooLargeError: `payload` is over the limit; nothing was sent.
            ConnectionClosedError: the peer is gone.
            ChannelError: it did not take the frame within `timeout` seconds, or an earlier one was interrupted.
        """
        self._check_usable()
        if len(payload) > self.max_frame:
            raise FrameTooLargeError(
                f"a {kind.name} message of {len(payload)} bytes is over the limit of {self.max_frame}; "
                f"raise {flag_name('max_frame_mib')} on both machines"
            )
        # One write for header and payload: one system call, one wake-up of the receiver.
        self._send(timeout, _HEADER.pack(kind, len(payload)) + payload)

    def send_data(self, kind: Kind, data: memoryview, *, timeout: float) -> None:
        """Sends one frame with a large payload, which is not copied before it is encrypted.

        Raises:
            ConnectionClosedError, ChannelError: as `send`.
        """
        self._check_usable()
        self._send(timeout, _HEADER.pack(kind, len(data)), data)

    def _send(self, timeout: float | None, *parts: bytes | memoryview) -> None:
        try:
            self._tls.send_parts(timeout, *parts)
        except TimeoutError:
            raise ChannelError(f"{self.peer} cannot be reached any more: timed out") from None
        except (OSError, ValueError) as error:
            raise ConnectionClosedError(f"{self.peer} cannot be reached any more: {_reason(error)}") from None
        except BaseException:
            self._interrupted = True
            raise

    def wait(self, timeout: float) -> bool:
        """Waits until a frame begins to arrive, or the connection is closed; False after `timeout` seconds."""
        if self.pending or (descriptor := self.fileno()) < 0:
            return True
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout) * 1000))

    def receive(self, *, timeout: float | None = None, spin: float = 0.0) -> Frame:
        """Receives one frame; polls for it without sleeping for the first `spin` seconds.

        Raises:
            ConnectionClosedError: the peer closed the connection.
            ChannelError: it sent nothing for `timeout` seconds, or no valid frame, or an earlier one was interrupted.
        """
        self._check_usable()
        try:
            return self._receive(timeout, spin)
        except BaseException as error:
            self._note_interruption(error)
            raise

    def receive_data(self, kind: Kind, buffer: memoryview, *, timeout: float) -> int | Frame:
        """Receives one frame. The payload of one of `kind` goes into `buffer`, and the result is its length.

        Args:
            kind: of frames with large payloads.
            buffer: for the payload.
            timeout: seconds of silence.

        Returns:
            The length, or a frame of another kind.

        Raises:
            ConnectionClosedError, ChannelError: as `receive`, or the payload is longer than `buffer`.
        """
        self._check_usable()
        try:
            deadline = time.monotonic() + timeout
            found, length = self._receive_header(deadline, 0.0)
            if found is not kind:
                return Frame(found, self._read(length, deadline))
            if length > len(buffer):
                raise ChannelError(f"{self.peer} sent {length} bytes where at most {len(buffer)} were asked for")
            self._fill(buffer[:length], deadline)
            return length
        except BaseException as error:
            self._note_interruption(error)
            raise

    def _note_interruption(self, error: BaseException) -> None:
        """Part of a frame may have been read: the rest would be taken for the header of the next one."""
        if not isinstance(error, Exception):
            self._interrupted = True

    def _receive(self, timeout: float | None, spin: float) -> Frame:
        deadline = None if timeout is None else time.monotonic() + timeout
        kind, length = self._receive_header(deadline, spin)
        return Frame(kind, self._read(length, deadline))

    def _receive_header(self, deadline: float | None, spin: float) -> tuple[Kind, int]:
        number, length = _HEADER.unpack(self._read(_HEADER.size, deadline, spin))
        try:
            kind = Kind(number)
        except ValueError:
            raise ChannelError(f"{self.peer} sent a message of unknown kind {number}") from None
        if length > self.max_frame:
            raise ChannelError(
                f"{self.peer} sent a {kind.name} message of {length} bytes, over the limit of {self.max_frame}; "
                f"raise {flag_name('max_frame_mib')} on this machine"
            )
        return kind, length

    def expect(self, *kinds: Kind, timeout: float | None = None, spin: float = 0.0) -> Frame:
        """Receives one frame that must be of one of `kinds`.

        Raises:
            ChannelError: as `receive`, or the frame is of another kind.
        """
        frame = self.receive(timeout=timeout, spin=spin)
        if frame.kind not in kinds:
            wanted = " or ".join(kind.name for kind in kinds)
            raise ChannelError(f"{self.peer} sent {frame.kind.name}, and {wanted} was expected")
        return frame

    def interrupt(self) -> None:
        """Ends a blocked `send` or `receive` of another thread with a ChannelError."""
        self._tls.interrupt()

    def close(self) -> None:
        """Closes the connection; may be called again."""
        self._tls.close()

    def _check_usable(self) -> None:
        if self._interrupted:
            raise ChannelError(f"the connection to {self.peer} cannot be used: a message was interrupted halfway")

    def _read(self, size: int, deadline: float | None, spin: float = 0.0) -> bytes:
        buffer = bytearray(size)
        self._fill(memoryview(buffer), deadline, spin)
        return bytes(buffer)

    def _fill(self, view: memoryview, deadline: float | None, spin: float = 0.0) -> None:
        try:
            self._tls.receive_into(view, deadline, spin)
        except EOFError:
            raise ConnectionClosedError(f"{self.peer} closed the connection") from None
        except TimeoutError:
            raise ChannelError(f"{self.peer} sent nothing in time") from None
        except (OSError, ValueError) as error:
            raise ConnectionClosedError(f"the connection to {self.peer} broke: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return without_stop(str(error)) or type(error).__name__
