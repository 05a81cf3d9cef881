"""The rendezvous and announcements of two ranks over one connected socket, for collectives without the executor.

The socket is neither encrypted nor authenticated: it is for benchmarks, tests and programs on a private network.
vllm_spark's executor uses its own channel.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
from typing import TYPE_CHECKING

from vllm_spark.collective.errors import CollectiveError

if TYPE_CHECKING:
    from vllm_spark.collective.runtime import Runtime

_HEADER = struct.Struct("<BxxxI")
_EXCHANGE, _ANNOUNCEMENT = 1, 2
_SEND_SECONDS = 5
_LARGEST = 1 << 20  # bytes; what is exchanged has a few thousand
_REMEDY = "see the output of its program, and start both again"


class SocketPeer:
    """The peer at the other end of `connection`, which this object owns from now on.

    Args:
        connection: a connected stream socket.
        timeout: seconds to wait for the peer's half of an exchange.
    """

    def __init__(self, connection: socket.socket, timeout: float = 120.0) -> None:
        self._connection, self._timeout = connection, timeout
        self._sending = threading.Lock()
        self._exchanged: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._runtime: Runtime | None = None
        self._pending: list[bytes] = []
        self._state = threading.Lock()
        self._closed_by_peer = False
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        # `announce` must not block: an announcement that cannot be sent is lost, and a later one replaces it.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_SECONDS, 0))
        threading.Thread(target=self._read, name="spark-peer", daemon=True).start()

    def exchange(self, mine: bytes) -> bytes:
        """Sends `mine` to the peer and returns its half: the `exchange` of `Runtime.connect`.

        Raises:
            CollectiveError: the peer closed the connection, or did not answer in time.
        """
        self._send(_EXCHANGE, mine)
        try:
            theirs = self._exchanged.get(timeout=self._timeout)
        except queue.Empty:
            raise CollectiveError(
                f"the peer did not answer within {self._timeout:g} s; check whether its program still runs, "
                "and start both again"
            ) from None
        if theirs is None:
            raise CollectiveError(f"the peer closed its connection; {_REMEDY}")
        return theirs

    def announce(self, announcement: bytes) -> None:
        """Sends an announcement: the `announce` of `Runtime.connect`."""
        self._send(_ANNOUNCEMENT, announcement)

    def watch(self, runtime: Runtime) -> None:
        """Delivers the peer's announcements to `runtime`, and aborts it when the peer closes the socket."""
        with self._state:
            self._runtime = runtime
            pending, self._pending = self._pending, []
            closed_by_peer = self._closed_by_peer
        for announcement in pending:
            runtime.deliver(announcement)
        if closed_by_peer:
            self._abort(runtime)

    def close(self) -> None:
        """Closes the socket; may be called again."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _send(self, kind: int, payload: bytes) -> None:
        try:
            with self._sending:
                self._connection.sendall(_HEADER.pack(kind, len(payload)) + payload)
        except OSError as error:
            raise CollectiveError(
                f"the peer cannot be reached any more ({error.strerror or error}); {_REMEDY}"
            ) from None

    def _read(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                kind, length = _HEADER.unpack(self._receive(_HEADER.size))
                if length > _LARGEST or kind not in (_EXCHANGE, _ANNOUNCEMENT):
                    break  # the peer does not speak this protocol
                payload = self._receive(length)
                if kind == _EXCHANGE:
                    self._exchanged.put(payload)
                else:
                    self._deliver(payload)
        with self._state:
            self._closed_by_peer = True
            runtime = self._runtime
        self._exchanged.put(None)
        if runtime is not None:
            self._abort(runtime)

    def _deliver(self, announcement: bytes) -> None:
        with self._state:
            runtime = self._runtime
            if runtime is None:
                self._pending = [announcement]  # each replaces the one before
        if runtime is not None and not runtime.closed:
            runtime.deliver(announcement)

    def _abort(self, runtime: Runtime) -> None:
        if not runtime.closed:
            runtime.abort("the peer closed its connection: its process has ended")

    def _receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = self._connection.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)
