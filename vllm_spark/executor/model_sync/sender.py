"""Sends files that this machine has to the other one: answers the requests that arrive on copy connections."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable

from vllm_spark.errors import RefusedError, SparkError
from vllm_spark.executor.channel.framing import ChannelError, Connection, Frame, Kind
from vllm_spark.executor.handshake.messages import LARGEST_PIECE, CopyList, CopyRange, Reason, decode_frame
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.executor.model_files.own import content_key
from vllm_spark.executor.model_sync.manifest import FileState, Manifest, changed, list_files
from vllm_spark.files import open_regular
from vllm_spark.records import to_json

logger = logging.getLogger("vllm_spark")

_SEND_TIMEOUT = 60.0  # seconds for the other machine to take a piece: it may wait for its disk
_REQUEST_TIMEOUT = 600.0  # seconds between two requests: its disk may have much to write
_MOST_CONNECTIONS = 16


class ModelSender:
    """Sends what was offered, and nothing else, to an authenticated peer. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._offered: dict[str, LoadedFiles] = {}
        self._listed: dict[str, tuple[Manifest, list[FileState]]] = {}
        self._lock = threading.Lock()
        self._listing = threading.Lock()
        self._connections: set[Connection] = set()
        self._closed = False
        self.sent = 0
        """Bytes that were sent."""

    def offer(self, files: Iterable[LoadedFiles]) -> None:
        """From now on these may be asked for. One that was offered before is listed again."""
        offered = {content_key(each): each for each in files}
        with self._lock:
            self._offered.update(offered)
            for key in offered:
                self._listed.pop(key, None)

    def changed(self) -> RefusedError | None:
        """Whether a compared file that was listed is another one now; the sentence, or None."""
        with self._lock:
            listed = list(self._listed.values())
        for _, states in listed:
            for state in states:
                if state.compared and not state.is_unchanged():
                    return RefusedError(changed(state.path))
        return None

    def serve(self, connection: Connection) -> None:
        """Answers requests until the connection is closed, by either side. Takes the connection."""
        with self._lock:
            refused = self._closed or len(self._connections) >= _MOST_CONNECTIONS
            if not refused:
                self._connections.add(connection)
        try:
            if not refused:
                self._serve(connection)
        except SparkError as error:
            logger.debug("A copy connection ended: %s.", error)
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def close_connections(self) -> None:
        """Ends the copies that are running."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.interrupt()

    def close(self) -> None:
        """Ends the copies that are running, and refuses others."""
        self._closed = True
        self.close_connections()

    def _serve(self, connection: Connection) -> None:
        buffer = memoryview(bytearray(LARGEST_PIECE))
        while True:
            frame = connection.expect(Kind.COPY_LIST, Kind.COPY_RANGE, timeout=_REQUEST_TIMEOUT)
            try:
                self._answer(connection, frame, buffer)
            except RefusedError as error:
                logger.error("%s.", error)
                connection.send(Kind.FAILURE, to_json(Reason(str(error))), timeout=_SEND_TIMEOUT)

    def _answer(self, connection: Connection, frame: Frame, buffer: memoryview) -> None:
        if frame.kind is Kind.COPY_LIST:
            manifest, _ = self._list(decode_frame(frame, CopyList).key, at_start=True)
            connection.send(Kind.COPY_FILES, to_json(manifest), timeout=_SEND_TIMEOUT)
            return
        request = decode_frame(frame, CopyRange)
        manifest, states = self._list(request.key)
        if not 0 <= request.file < len(states):
            raise ChannelError(f"{connection.peer} asked for the file {request.file} of {len(states)}")
        size = manifest.files[request.file].size
        if request.offset < 0 or request.length < 0 or request.offset + request.length > size:
            raise ChannelError(
                f"{connection.peer} asked for {request.length} bytes at {request.offset} of a file with {size} bytes"
            )
        self._send_range(connection, states[request.file], request, buffer)

    def _list(self, key: str, *, at_start: bool = False) -> tuple[Manifest, list[FileState]]:
        """The list for a key. At the start of a copy it is made again if a file that is not compared was changed."""
        with self._listing:  # several streams may ask at once
            with self._lock:
                wanted, listed = self._offered.get(key), self._listed.get(key)
            if listed is not None and not (at_start and _is_outdated(listed[1])):
                return listed
            if wanted is None:
                raise RefusedError("the other machine asked for files that were not offered; start its command again")
            made = list_files(wanted)
            with self._lock:
                self._listed[key] = made
            return made

    def _send_range(self, connection: Connection, state: FileState, request: CopyRange, buffer: memoryview) -> None:
        try:
            with open_regular(state.path) as file:
                if state.compared and not state.is_unchanged():
                    raise RefusedError(changed(state.path))
                descriptor, at, end = file.fileno(), request.offset, request.offset + request.length
                while at < end:
                    count = os.preadv(descriptor, [buffer[: min(len(buffer), end - at)]], at)
                    if count == 0:
                        raise RefusedError(changed(state.path))
                    connection.send_data(Kind.COPY_DATA, buffer[:count], timeout=_SEND_TIMEOUT)
                    at += count
                    with self._lock:
                        self.sent += count
                # A file that is not compared may have grown, and its listed part is as before: the receiver looks.
                if state.compared and not state.is_unchanged():
                    raise RefusedError(changed(state.path))
                with contextlib.suppress(OSError):
                    # vLLM would count these pages as used memory.
                    os.posix_fadvise(descriptor, request.offset, request.length, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise RefusedError(f"{state.path} cannot be read ({error.strerror}) while it is copied") from None
        connection.send(Kind.COPY_END, timeout=_SEND_TIMEOUT)


def _is_outdated(states: list[FileState]) -> bool:
    return any(not state.compared and not state.is_unchanged() for state in states)
