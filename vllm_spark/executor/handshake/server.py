"""The server side of the handshake: accepts one follower and refuses connections that do not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vllm_spark.config.settings import SparkConfig, split_endpoint
from vllm_spark.errors import (
    OtherSecretError,
    PeerLostError,
    RefusedError,
    SparkError,
    upper_first,
    without_numbers,
    without_stop,
)
from vllm_spark.executor.channel.addresses import format_endpoint, host_name, is_loopback, listen
from vllm_spark.executor.channel.certificates import DOCTOR_PROTOCOL, tls_context
from vllm_spark.executor.channel.framing import MIB, ChannelError, Connection, Frame, Kind
from vllm_spark.executor.channel.secret import load_secret, secret_source
from vllm_spark.executor.channel.tls import HandshakeError, TlsConnection, explain_failure
from vllm_spark.executor.handshake.limited_log import LimitedLog
from vllm_spark.executor.handshake.messages import (
    CHECK,
    CONNECTIONS,
    CONTROL,
    COPY,
    GREETING_TIMEOUT,
    GROUPS,
    RPC,
    Hello,
    Offer,
    Progress,
    Reason,
    Welcome,
    decode_frame,
    join_command,
    where_to_run,
)
from vllm_spark.executor.handshake.versions import Versions
from vllm_spark.executor.model_sync.progress import CopyDisplay
from vllm_spark.records import to_json

logger = logging.getLogger("vllm_spark")

_HANDSHAKE_LIMIT = 64 << 10  # bytes of a message before the connection is accepted
_OFFER_TIMEOUT = 300.0  # seconds without an answer or a PROGRESS: the follower reads its model's weight files
_NOTE_INTERVAL = 15.0  # seconds between two log lines while the leader waits
_MAX_HANDSHAKES = 8  # handshakes at once; more connections wait in the kernel's backlog


@dataclasses.dataclass
class Follower:
    """An accepted follower: its name in messages and its connections."""

    name: str
    control: Connection
    rpc: Connection
    groups: Connection


class Listener:
    """Listens for followers: does the handshake with each connection, accepts one follower and refuses the others.

    Args:
        address, port: where to listen.
        context: TLS context of the leader.
        max_frame: limit of one message once a follower is accepted, in bytes.
        secret_file: the secret file that was given, for the command that is suggested for the other machine.
        secret_source: where the secret comes from, for errors; see `secret_source`.
        suggest_command: makes that command from the endpoint and the secret file.
        any_versions: accepts followers with other versions too; for checks, not for serving.
        serve_copy: takes each copy connection of the accepted follower, in a thread of its own; None refuses them.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """

    def __init__(
        self,
        address: str,
        port: int,
        context: ssl.SSLContext,
        max_frame: int,
        secret_file: Path | None = None,
        *,
        secret_source: str = "",
        suggest_command: Callable[[str, Path | None], str] = join_command,
        any_versions: bool = False,
        serve_copy: Callable[[Connection], None] | None = None,
    ) -> None:
        self._serve_copy = serve_copy
        self._context, self._max_frame, self._secret_source = context, max_frame, secret_source
        self._last_problem = ""
        self._other_secret: str | None = None  # the address of the last peer, if it has another secret
        self._refusals: dict[str, str] = {}  # by host, without numbers
        self._versions = None if any_versions else Versions.of_this_process()
        self._lock = threading.Lock()
        self._accepted: Hello | None = None
        self._accepted_at = 0.0
        self._control: queue.SimpleQueue[tuple[Hello, Connection]] = queue.SimpleQueue()
        # The further connections of the accepted follower.
        self._session_connections: dict[str, queue.SimpleQueue[tuple[Hello, Connection]]] = {
            connection: queue.SimpleQueue() for connection in (RPC, GROUPS)
        }
        self._rejected = LimitedLog("rejected connections")
        self._checks = LimitedLog("checks of this port by vllm-spark doctor", level=logging.INFO)
        self._handshakes = threading.BoundedSemaphore(_MAX_HANDSHAKES)
        self._closed = False
        self._socket = listen(address, port)
        self.endpoint = format_endpoint(address, self._socket.getsockname()[1])
        self._join_command = suggest_command(self.endpoint, secret_file)
        threading.Thread(target=self._accept, name="spark-listener", daemon=True).start()

    def wait_for_follower(
        self, offer: Offer, timeout: float, changed: Callable[[], RefusedError | None] = lambda: None
    ) -> Follower:
        """Waits for a follower that has the offered model.

        A follower that does not fit gets the reason, which is logged, and the wait goes on. The wait is logged too.

        Args:
            offer: the model.
            timeout: seconds of waiting, without the time in which a follower reads or copies files.
            changed: looks whether the offered files were changed since; returns the error, or None.

        Raises:
            PeerLostError: no fitting follower connected within `timeout` seconds.
            RefusedError: the offered files were changed.
        """
        for hello, control in self._accepted_followers(timeout):
            follower: Follower | None = None
            try:
                follower = self._make_offer(hello, control, offer)
                if follower is None:
                    logger.info("%s starts again, with this leader's environment.", upper_first(control.peer))
            except SparkError as error:
                self._last_problem = f"; the last follower did not fit: {error}"
                if self._is_new_reason(hello.host, str(error)):
                    logger.warning("%s does not fit: %s. Still waiting.", upper_first(control.peer), error)
            change = changed()
            if follower is not None:
                if change is None:
                    return follower
                with contextlib.suppress(SparkError):  # it has the reason, or was lost meanwhile
                    control.send(Kind.FAILURE, to_json(Reason(str(change))), timeout=GREETING_TIMEOUT)
                follower.rpc.close()
                follower.groups.close()
            control.close()
            self._release()
            if change is not None:
                raise change
        raise self._no_follower(timeout)

    def wait_for_any_follower(self, timeout: float) -> tuple[Hello, Connection]:
        """Waits for a follower without offering a model; returns its HELLO and its control connection.

        Raises:
            PeerLostError: no follower connected within `timeout` seconds.
        """
        for arrival in self._accepted_followers(timeout):
            return arrival
        raise self._no_follower(timeout)

    def _accepted_followers(self, timeout: float) -> Iterator[tuple[Hello, Connection]]:
        """Followers that passed the handshake, for `timeout` seconds of waiting; logs what it waits for every 15 s.

        The time in which one of them is made an offer does not count: it may copy a model for hours.
        """
        start = time.monotonic()
        next_note = 0.0
        while (waited := time.monotonic() - start) < timeout:
            if waited >= next_note:
                self._log_waiting(waited, timeout)
                next_note = waited + _NOTE_INTERVAL
            try:
                arrival = self._control.get(timeout=min(1.0, timeout - waited))
            except queue.Empty:
                continue
            arrived = time.monotonic()
            yield arrival
            start += time.monotonic() - arrived

    def _no_follower(self, timeout: float) -> PeerLostError:
        sentence = (
            f"no follower connected to {self.endpoint} within {timeout:g} s{self._last_problem}{self._firewall_hint()}"
            f"; {where_to_run(self.endpoint)} run: {self._join_command}"
        )
        return OtherSecretError(sentence, self._other_secret) if self._other_secret else PeerLostError(sentence)

    def _firewall_hint(self) -> str:
        """A hint at the firewall, if no connection arrived at all."""
        host, port = split_endpoint(self.endpoint)
        if is_loopback(host) or self._last_problem:
            return ""
        return f"; if it is running, allow TCP port {port} in the firewall of this machine"

    def _log_waiting(self, waited: float, timeout: float) -> None:
        logger.info(
            "Waiting for the follower at %s (%.0f s of %g s%s). %s run: %s",
            self.endpoint,
            waited,
            timeout,
            self._last_problem,
            upper_first(where_to_run(self.endpoint)),
            self._join_command,
        )

    def close(self) -> None:
        """Stops listening; connections of an accepted follower stay open. May be called again."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._rejected.close()
        self._checks.close()

    def _make_offer(self, hello: Hello, control: Connection, offer: Offer) -> Follower | None:
        """Offers the model; None if the follower reconnects from another process, with this leader's environment.

        Raises:
            SparkError: it does not fit, or its connection was lost.
        """
        control.send(Kind.OFFER, to_json(offer), timeout=GREETING_TIMEOUT)
        answer = self._answer(control)
        if answer.kind is Kind.RESTART:
            return None
        if answer.kind is Kind.FAILURE:
            raise RefusedError(decode_frame(answer, Reason).sentence)
        rpc, groups = (self._session_connection(connection, hello.session) for connection in (RPC, GROUPS))
        for connection in (control, rpc, groups):
            connection.disable_keepalive()
        return Follower(f"the follower on {hello.host} (process {hello.process})", control, rpc, groups)

    def _answer(self, control: Connection) -> Frame:
        """A follower's answer to an offer. Meanwhile it reports its progress: it may have to download a model."""
        activity = ""
        with CopyDisplay(f"Sending to {control.peer}") as display:
            while True:
                frame = control.expect(
                    *(Kind.ACCEPTANCE, Kind.FAILURE, Kind.RESTART, Kind.PROGRESS), timeout=_OFFER_TIMEOUT
                )
                if frame.kind is not Kind.PROGRESS:
                    return frame
                progress = decode_frame(frame, Progress)
                if progress.activity != activity:
                    activity = progress.activity
                    logger.info("%s is %s.", upper_first(control.peer), activity)
                if progress.copy is not None:
                    display.show(progress.copy)

    def _session_connection(self, name: str, session: str) -> Connection:
        """Another connection of the session; closes late connections of earlier sessions."""
        end = time.monotonic() + GREETING_TIMEOUT
        while True:
            try:
                hello, connection = self._session_connections[name].get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise PeerLostError(
                    f"it did not open the connection for {name} within {GREETING_TIMEOUT:g} s"
                ) from None
            if hello.session == session:
                return connection
            connection.close()

    def _release(self, hello: Hello | None = None) -> None:
        """Lets another follower be accepted, if `hello` (default: any) is of the accepted one."""
        with self._lock:
            if hello is not None and self._accepted is not hello:
                return
            self._accepted = None
        for connections in self._session_connections.values():
            with contextlib.suppress(queue.Empty):  # another thread may empty the queue too
                while True:
                    connections.get_nowait()[1].close()

    def _accept(self) -> None:
        while not self._closed:
            self._handshakes.acquire()
            try:
                connection, address = self._socket.accept()
            except OSError:
                self._handshakes.release()
                if not self._closed:
                    time.sleep(0.05)  # out of descriptors: retry
                continue
            try:
                threading.Thread(target=self._handshake, args=(connection, address[0]), daemon=True).start()
            except RuntimeError as error:  # out of threads: retry with the next connection
                reason = without_stop(str(error))
                self._rejected.add(address[0], reason, f"Rejected a connection from {address[0]}: {reason}.")
                connection.close()
                self._handshakes.release()

    def _handshake(self, plain: socket.socket, peer: str) -> None:
        connection: Connection | None = None
        hello: Hello | None = None
        protocol: str | None = None
        try:
            tls = TlsConnection(plain, self._context, server_side=True, timeout=GREETING_TIMEOUT)
            protocol = tls.protocol
            connection = Connection(tls, peer, _HANDSHAKE_LIMIT)
            if (role := connection.peer_role) != "follower":
                raise ChannelError(f"it authenticated as {role!r}, not as a follower")
            hello = decode_frame(connection.expect(Kind.HELLO, timeout=GREETING_TIMEOUT), Hello)
            if hello.connection == CHECK:
                self._answer_check(hello, connection, peer)
                return
            if hello.connection not in CONNECTIONS or (hello.connection == COPY and self._serve_copy is None):
                raise ChannelError(f"its HELLO is for a connection {hello.connection!r}, which does not exist")
            if refusal := self._refusal_of(hello):
                connection.send(Kind.REFUSAL, to_json(refusal), timeout=GREETING_TIMEOUT)
                reason = refusal.sentence
                if self._is_new_reason(hello.host, reason):
                    self._rejected.add(
                        peer, "refused", f"Refused a follower on {hello.host} (process {hello.process}): {reason}."
                    )
                self._last_problem = f"; the last follower, on {hello.host}, was refused: {reason}"
                self._other_secret = None
                connection.close()
                return
            connection.send(Kind.WELCOME, to_json(Welcome(host_name(), os.getpid())), timeout=GREETING_TIMEOUT)
            connection.max_frame = self._max_frame
            connection.peer = f"the follower on {hello.host} ({peer})"
            if hello.connection == COPY and self._serve_copy is not None:
                threading.Thread(target=self._serve_copy, args=(connection,), name="spark-copy", daemon=True).start()
                return
            (self._control if hello.connection == CONTROL else self._session_connections[hello.connection]).put(
                (hello, connection)
            )
        except (OSError, SparkError) as error:
            # Port scanners, other secrets, broken clients: logged, and the server goes on.
            reason = explain_failure(error, self._secret_source)
            if DOCTOR_PROTOCOL in (protocol, error.protocol if isinstance(error, HandshakeError) else None):
                self._checks.add(peer, reason, f"vllm-spark doctor at {peer} checked this port: {reason}.")
            else:
                self._rejected.add(peer, reason, f"Rejected a connection from {peer}: {reason}.")
                self._last_problem = f"; the last connection, from {peer}, was rejected: {reason}"
                self._other_secret = peer if isinstance(error, HandshakeError) and error.is_other_secret else None
            if hello is not None:
                self._release(hello)
            if connection is not None:
                connection.close()
            plain.close()
        finally:
            self._handshakes.release()

    def _answer_check(self, hello: Hello, connection: Connection, peer: str) -> None:
        """Answers `vllm-spark doctor --leader` as a follower would be answered, and closes the connection."""
        with self._lock:
            refusal = self._refusal_of_session(hello)
        if refusal is not None:
            connection.send(Kind.REFUSAL, to_json(refusal), timeout=GREETING_TIMEOUT)
        else:
            connection.send(Kind.WELCOME, to_json(Welcome(host_name(), os.getpid())), timeout=GREETING_TIMEOUT)
        connection.close()
        sentence = f"vllm-spark doctor on {hello.host} checked this port; both machines have the same secret."
        self._checks.add(peer, "answered", sentence)

    def _is_new_reason(self, host: str, sentence: str) -> bool:
        """Whether the follower on `host` is refused for another reason than at its last attempt."""
        with self._lock:
            previous = self._refusals.get(host)
            self._refusals[host] = without_numbers(sentence)
            return previous != self._refusals[host]

    def _refusal_of(self, hello: Hello) -> Reason | None:
        """Why `hello` is refused; None if it is accepted, and then no other session is until `_release`."""
        with self._lock:
            if hello.connection != CONTROL:
                if difference := self._difference(hello):
                    return difference
                if self._accepted is None or self._accepted.session != hello.session:
                    return Reason("its session is not the accepted one")
                return None
            if (refusal := self._refusal_of_session(hello)) is None:
                self._accepted, self._accepted_at = hello, time.monotonic()
            return refusal

    def _refusal_of_session(self, hello: Hello) -> Reason | None:
        """Why a new session with `hello` would be refused now. The caller holds the lock."""
        if difference := self._difference(hello):
            return difference
        if self._accepted is None:
            return None
        held = time.monotonic() - self._accepted_at
        return Reason(
            f"this leader has a follower already, on {self._accepted.host} "
            f"(process {self._accepted.process}), for {held:.0f} s; stop that one first"
        )

    def _difference(self, hello: Hello) -> Reason | None:
        if self._versions and (difference := self._versions.difference(hello.versions, "the leader", "the follower")):
            return Reason(difference, final=True)
        return None


def listener_at(
    address: str,
    config: SparkConfig,
    *,
    suggest_command: Callable[[str, Path | None], str] = join_command,
    any_versions: bool = False,
    serve_copy: Callable[[Connection], None] | None = None,
) -> Listener:
    """A listener at this machine's `address`, with the port, secret and limits of the settings; see `Listener`.

    Raises:
        ConfigurationError: there is no valid secret, or the port cannot be listened at.
    """
    return Listener(
        address,
        config.port,
        tls_context(load_secret(config, address), "leader"),
        config.max_frame_mib * MIB,
        config.secret_file,
        secret_source=secret_source(config, address),
        suggest_command=suggest_command,
        any_versions=any_versions,
        serve_copy=serve_copy,
    )
