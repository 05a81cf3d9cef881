"""How a follower finds its leader, and how each makes sure that the other fits.

Everything here is JSON over an authenticated connection: nothing is unpickled before both sides have agreed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import queue
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import msgspec

from vllm_spark import __version__
from vllm_spark.errors import ConfigurationError, PeerLostError, RefusedError, SparkError
from vllm_spark.executor.channel import ChannelError, Frame, Kind, Lane
from vllm_spark.executor.invitation import join_command, where_to_type
from vllm_spark.executor.model_identity import ModelIdentity
from vllm_spark.executor.tls import TlsConnection
from vllm_spark.wording import upper_first

logger = logging.getLogger("vllm_spark")

CHANNEL_VERSION = 1
"""Version of the messages between leader and follower."""

CONTROL, CALLS = "control", "calls"

_GREETING_LIMIT = 64 << 10  # bytes; a greeting is small, whoever sends more is no follower
_GREETING_TIMEOUT = 5.0  # seconds for one connection to authenticate and to say who it is
_OFFER_TIMEOUT = 300.0  # seconds for the follower to read through its model's weight files
_NOTE_INTERVAL = 15.0  # seconds between two lines that say for whom the leader waits
_GREETERS = 8  # connections that may be greeted at once; more wait in the kernel's queue


Message = TypeVar("Message", bound=msgspec.Struct)


class Versions(msgspec.Struct, frozen=True):
    """What must be the same on both machines, for pickles and for numbers."""

    channel: str
    vllm_spark: str
    vllm: str
    torch: str
    python: str

    @classmethod
    def of_this_process(cls) -> Versions:
        """The versions installed here; a package that is absent counts as `none`."""
        return cls(
            channel=str(CHANNEL_VERSION),
            vllm_spark=__version__,
            vllm=_installed("vllm"),
            torch=_installed("torch").partition("+")[0],
            python=".".join(platform.python_version_tuple()[:2]),
        )

    def difference(self, other: Versions, here: str, there: str) -> str | None:
        """A sentence part naming the first differing field and both values; None if all agree."""
        for field in self.__struct_fields__:
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                return f"{field} is {mine} on {here} and {theirs} on {there}; install the same version on both"
        return None


class Hello(msgspec.Struct, frozen=True):
    """A follower's first words on each lane."""

    lane: str
    session: str
    host: str
    process: int
    versions: Versions


class Welcome(msgspec.Struct, frozen=True):
    """The leader's answer to a Hello that it takes."""

    host: str
    process: int


class Reason(msgspec.Struct, frozen=True):
    """Why a connection, a model or the common work was ended."""

    sentence: str
    details: str = ""


class Offer(msgspec.Struct, frozen=True):
    """What the leader serves; the follower must have the same."""

    model: str
    revision: str | None
    load_format: str
    with_weights: bool
    identity: ModelIdentity
    heartbeat_timeout: float


class Follower(msgspec.Struct):
    """An accepted follower: its two lanes and how to call it."""

    name: str
    control: Lane
    calls: Lane


class Listener:
    """The leader's ear: greets every connection, hands on one follower, turns the rest away with a sentence.

    Args:
        address, port: where to listen, and nowhere else.
        context: TLS context of the leader.
        max_frame: limit of one message once a follower is accepted, in bytes.
        secret_file: where the secret came from, for the command that is suggested for the other machine.
        invitation: makes that command from the endpoint and the secret file.
        any_versions: takes followers with other versions than this process's too: they will not work together.

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
        invitation: Callable[[str, Path | None], str] = join_command,
        any_versions: bool = False,
    ) -> None:
        self._context, self._max_frame = context, max_frame
        self._last_problem = ""
        self._versions = None if any_versions else Versions.of_this_process()
        self._lock = threading.Lock()
        self._claimant: Hello | None = None
        self._claimed_at = 0.0
        self._control: queue.SimpleQueue[tuple[Hello, Lane]] = queue.SimpleQueue()
        self._calls: queue.SimpleQueue[tuple[Hello, Lane]] = queue.SimpleQueue()
        self._greeters = threading.BoundedSemaphore(_GREETERS)
        self._closed = False
        self._socket = bind(address, port)
        self._socket.listen(32)
        self.endpoint = format_endpoint(address, self._socket.getsockname()[1])
        self._invitation = invitation(self.endpoint, secret_file)
        threading.Thread(target=self._accept, name="spark-listener", daemon=True).start()

    def wait_for_follower(self, offer: Offer, timeout: float) -> Follower:
        """Waits for a follower that has the offered model.

        A follower that does not fit is told why, logged, and waited past. What it waits for is logged now and then.

        Raises:
            PeerLostError: nobody fitting came within `timeout` seconds.
        """
        for hello, control in self._arrivals(timeout):
            try:
                return self._settle(hello, control, offer)
            except SparkError as error:
                self._last_problem = f"; the last one that came did not fit: {error}"
                logger.warning("The follower on %s does not fit: %s. Still waiting.", hello.host, error)
                control.close()
                self._release()
        raise self._nobody_came(timeout)

    def wait_for_visitor(self, timeout: float) -> tuple[Hello, Lane]:
        """Waits for a follower that is offered nothing, and returns what it said and its control lane.

        Raises:
            PeerLostError: nobody came within `timeout` seconds.
        """
        for visitor in self._arrivals(timeout):
            return visitor
        raise self._nobody_came(timeout)

    def _arrivals(self, timeout: float) -> Iterator[tuple[Hello, Lane]]:
        """Those that come within `timeout` seconds. What it waits for is logged now and then."""
        start = time.monotonic()
        next_note = 0.0
        while (waited := time.monotonic() - start) < timeout:
            if waited >= next_note:
                self._announce(waited, timeout)
                next_note = waited + _NOTE_INTERVAL
            with contextlib.suppress(queue.Empty):
                yield self._control.get(timeout=min(1.0, timeout - waited))

    def _nobody_came(self, timeout: float) -> PeerLostError:
        return PeerLostError(
            f"no follower came to {self.endpoint} within {timeout:g} s{self._last_problem}; "
            f"{where_to_type(self.endpoint)} run: {self._invitation}"
        )

    def _announce(self, waited: float, timeout: float) -> None:
        logger.info(
            "Waiting for the follower at %s (%.0f s of %g s%s). %s run: %s",
            self.endpoint,
            waited,
            timeout,
            self._last_problem,
            upper_first(where_to_type(self.endpoint)),
            self._invitation,
        )

    def close(self) -> None:
        """Stops listening; connections already handed on stay open. May be called again."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _settle(self, hello: Hello, control: Lane, offer: Offer) -> Follower:
        control.send(Kind.OFFER, msgspec.json.encode(offer), timeout=_GREETING_TIMEOUT)
        answer = control.expect(Kind.ACCEPTANCE, Kind.FAILURE, timeout=_OFFER_TIMEOUT)
        if answer.kind is Kind.FAILURE:
            raise RefusedError(decode(answer, Reason).sentence)
        calls = self._calls_lane(hello.session)
        for lane in (control, calls):
            lane.rely_on_beats()
        return Follower(f"the follower on {hello.host} (process {hello.process})", control, calls)

    def _calls_lane(self, session: str) -> Lane:
        """The session's second connection. One of a session that was given up may still be on its way here."""
        end = time.monotonic() + _GREETING_TIMEOUT
        while True:
            try:
                hello, calls = self._calls.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise PeerLostError("it opened no second connection") from None
            if hello.session == session:
                return calls
            calls.close()

    def _release(self, claimant: Hello | None = None) -> None:
        """Gives the place free, if `claimant` has it (default: whoever has it)."""
        with self._lock:
            if claimant is not None and self._claimant is not claimant:
                return
            self._claimant = None
        with contextlib.suppress(queue.Empty):  # another thread may empty it too
            while True:
                self._calls.get_nowait()[1].close()

    def _accept(self) -> None:
        while not self._closed:
            self._greeters.acquire()
            try:
                connection, address = self._socket.accept()
            except OSError:
                self._greeters.release()
                if not self._closed:
                    time.sleep(0.05)  # out of descriptors: the next try may find one
                continue
            try:
                threading.Thread(target=self._greet, args=(connection, address[0]), daemon=True).start()
            except RuntimeError as error:  # out of threads: the next connection may find one
                logger.warning("Turned away a connection from %s: %s.", address[0], error)
                connection.close()
                self._greeters.release()

    def _greet(self, plain: socket.socket, peer: str) -> None:
        lane: Lane | None = None
        hello: Hello | None = None
        try:
            connection = TlsConnection(plain, self._context, server_side=True, timeout=_GREETING_TIMEOUT)
            lane = Lane(connection, peer, _GREETING_LIMIT)
            if (role := lane.peer_role) != "follower":
                raise ChannelError(f"it authenticated as {role!r}, not as a follower")
            hello = decode(lane.expect(Kind.HELLO, timeout=_GREETING_TIMEOUT), Hello)
            if hello.lane not in (CONTROL, CALLS):
                raise ChannelError(f"it asked for a lane {hello.lane!r}, which does not exist")
            if refusal := self._judge(hello):
                lane.send(Kind.REFUSAL, msgspec.json.encode(Reason(refusal)), timeout=_GREETING_TIMEOUT)
                logger.warning("Refused a follower on %s (process %d): %s.", hello.host, hello.process, refusal)
                self._last_problem = f"; the last one that came, from {hello.host}, was refused: {refusal}"
                lane.close()
                return
            lane.send(Kind.WELCOME, msgspec.json.encode(Welcome(host_name(), os.getpid())), timeout=_GREETING_TIMEOUT)
            lane.max_frame = self._max_frame
            lane.peer = f"the follower on {hello.host}"
            (self._control if hello.lane == CONTROL else self._calls).put((hello, lane))
        except (OSError, SparkError) as error:
            # Port scanners, other secrets, broken clients: worth a line, never worth the server.
            reason = _handshake_reason(error)
            logger.warning("Turned away a connection from %s: %s.", peer, reason)
            self._last_problem = f"; the last one that came, from {peer}, was turned away: {reason}"
            if hello is not None:
                self._release(hello)
            if lane is not None:
                lane.close()
            plain.close()
        finally:
            self._greeters.release()

    def _judge(self, hello: Hello) -> str | None:
        """Why `hello` is refused; None if it is taken, in which case its session holds the place."""
        if self._versions and (difference := self._versions.difference(hello.versions, "the leader", "the follower")):
            return difference
        with self._lock:
            if hello.lane == CALLS:
                if self._claimant is None or self._claimant.session != hello.session:
                    return "its session is not the one that was accepted"
                return None
            if self._claimant is not None:
                held = time.monotonic() - self._claimed_at
                return (
                    f"this leader has a follower already, on {self._claimant.host} "
                    f"(process {self._claimant.process}), for {held:.0f} s; stop that one first"
                )
            self._claimant, self._claimed_at = hello, time.monotonic()
            return None


class Caller:
    """The follower's mouth: connects both lanes to a leader."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext, max_frame: int) -> None:
        self.host, self.port, self._context, self._max_frame = host, port, context, max_frame
        self._session = secrets.token_hex(16)
        self._versions = Versions.of_this_process()
        self.endpoint = format_endpoint(host, port)

    def connect(self, lane: str) -> Lane | None:
        """Opens one lane; None if nobody listens there now.

        Raises:
            ConfigurationError: the leader has another secret, or is no vllm-spark leader.
            RefusedError: the leader gave a reason.
        """
        try:
            plain = socket.create_connection((self.host, self.port), timeout=_GREETING_TIMEOUT)
        except OSError:
            return None
        try:
            connection = TlsConnection(plain, self._context, server_side=False, timeout=_GREETING_TIMEOUT)
            opened = Lane(connection, f"the leader at {self.endpoint}", self._max_frame)
            if (role := opened.peer_role) != "leader":
                raise ConfigurationError(f"{self.endpoint} authenticated as {role!r}, not as a leader")
            hello = Hello(lane, self._session, host_name(), os.getpid(), self._versions)
            opened.send(Kind.HELLO, msgspec.json.encode(hello), timeout=_GREETING_TIMEOUT)
            answer = opened.expect(Kind.WELCOME, Kind.REFUSAL, timeout=_GREETING_TIMEOUT)
        except ssl.SSLError as error:
            plain.close()
            raise ConfigurationError(f"{self.endpoint}: {_handshake_reason(error)}") from None
        except (OSError, ChannelError):
            plain.close()
            return None
        if answer.kind is Kind.REFUSAL:
            opened.close()
            raise RefusedError(f"the leader at {self.endpoint} refused: {decode(answer, Reason).sentence}")
        return opened


def bind(address: str, port: int) -> socket.socket:
    """A TCP socket bound to `address`:`port` and to nothing else.

    Raises:
        ConfigurationError: it is taken or not allowed; the sentence says which flag to change.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((address, port))
    except OSError as error:
        bound.close()
        raise ConfigurationError(
            f"cannot listen on {format_endpoint(address, port)} ({error.strerror}); "
            "choose another port with --spark-port, or end the process that holds it"
        ) from None
    return bound


def decode(frame: Frame, kind: type[Message]) -> Message:
    """The JSON message in `frame`.

    Raises:
        ChannelError: it is none of that type.
    """
    try:
        return msgspec.json.decode(frame.payload, type=kind)
    except msgspec.MsgspecError as error:
        raise ChannelError(f"a {frame.kind.name} message could not be read: {error}") from None


def format_endpoint(host: str, port: int) -> str:
    """`10.0.0.1:29650`, `[fe80::1]:29650`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_name() -> str:
    """This machine's name, for messages."""
    return socket.gethostname()


def _installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"


def _handshake_reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return "the other side has another secret; give both machines the same (--spark-secret-file or SPARK_SECRET)"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "").upper()
        if "UNKNOWN_CA" in reason or "DECRYPT_ERROR" in reason or "CERTIFICATE" in reason:
            return (
                "the other side has another secret; give both machines the same (--spark-secret-file or SPARK_SECRET)"
            )
        return f"what is there does not speak this protocol ({reason.replace('_', ' ').lower() or error})"
    if isinstance(error, OSError):
        return f"the connection broke before it was authenticated ({error.strerror or error})"
    return str(error)
