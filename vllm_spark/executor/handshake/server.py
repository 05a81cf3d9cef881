"""The leader's ear: how it finds its follower, and turns away whoever does not fit."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from vllm_spark.config.settings import split_endpoint
from vllm_spark.errors import PeerLostError, RefusedError, SparkError, upper_first, without_numbers, without_stop
from vllm_spark.executor.channel.addresses import format_endpoint, host_name, is_loopback, listen
from vllm_spark.executor.channel.framing import ChannelError, Frame, Kind, Lane
from vllm_spark.executor.channel.tls import TlsConnection, failure_in_words
from vllm_spark.executor.handshake.limited_log import LimitedLog
from vllm_spark.executor.handshake.messages import (
    CALLS,
    CONTROL,
    GREETING_TIMEOUT,
    GROUPS,
    LANES,
    Hello,
    Offer,
    Progress,
    Reason,
    Welcome,
    decode,
    join_command,
    where_to_type,
)
from vllm_spark.executor.handshake.versions import Versions

logger = logging.getLogger("vllm_spark")

_GREETING_LIMIT = 64 << 10  # bytes; a greeting is small, whoever sends more is no follower
_OFFER_TIMEOUT = 300.0  # seconds for the follower to read through its model's weight files
_NOTE_INTERVAL = 15.0  # seconds between two lines that say for whom the leader waits
_GREETERS = 8  # connections that may be greeted at once; more wait in the kernel's queue


class Follower(msgspec.Struct):
    """An accepted follower: its lanes and how to call it."""

    name: str
    control: Lane
    calls: Lane
    groups: Lane


class Listener:
    """Greets every connection, hands on one follower, turns the rest away with a sentence.

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
        self._refusals: dict[str, str] = {}  # by host, without numbers
        self._versions = None if any_versions else Versions.of_this_process()
        self._lock = threading.Lock()
        self._claimant: Hello | None = None
        self._claimed_at = 0.0
        self._control: queue.SimpleQueue[tuple[Hello, Lane]] = queue.SimpleQueue()
        # The lanes that an accepted follower opens besides.
        self._further: dict[str, queue.SimpleQueue[tuple[Hello, Lane]]] = {
            lane: queue.SimpleQueue() for lane in (CALLS, GROUPS)
        }
        self._turned_away = LimitedLog("connections that were turned away")
        self._greeters = threading.BoundedSemaphore(_GREETERS)
        self._closed = False
        self._socket = listen(address, port)
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
                if (follower := self._settle(hello, control, offer)) is not None:
                    return follower
                logger.info("The follower on %s starts again, with this leader's environment.", hello.host)
            except SparkError as error:
                self._last_problem = f"; the last one that came did not fit: {error}"
                if self._is_news(hello.host, str(error)):
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
            f"no follower came to {self.endpoint} within {timeout:g} s{self._last_problem}{self._firewall()}; "
            f"{where_to_type(self.endpoint)} run: {self._invitation}"
        )

    def _firewall(self) -> str:
        """What may keep a follower out that nobody has seen."""
        host, port = split_endpoint(self.endpoint)
        if is_loopback(host) or self._last_problem:
            return ""
        return f"; if it waits already, let TCP port {port} through the firewall of this machine"

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
        self._turned_away.close()

    def _settle(self, hello: Hello, control: Lane, offer: Offer) -> Follower | None:
        """Offers the model; None if the follower comes back with this leader's environment, in another process.

        Raises:
            SparkError: it does not fit, or went away.
        """
        control.send(Kind.OFFER, msgspec.json.encode(offer), timeout=GREETING_TIMEOUT)
        answer = self._answer(hello, control)
        if answer.kind is Kind.RESTART:
            return None
        if answer.kind is Kind.FAILURE:
            raise RefusedError(decode(answer, Reason).sentence)
        calls, groups = (self._further_lane(lane, hello.session) for lane in (CALLS, GROUPS))
        for lane in (control, calls, groups):
            lane.rely_on_beats()
        return Follower(f"the follower on {hello.host} (process {hello.process})", control, calls, groups)

    def _answer(self, hello: Hello, control: Lane) -> Frame:
        """What a follower says to an offer. It may take long to download a model, and reports that it does."""
        activity = ""
        while True:
            frame = control.expect(Kind.ACCEPTANCE, Kind.FAILURE, Kind.RESTART, Kind.PROGRESS, timeout=_OFFER_TIMEOUT)
            if frame.kind is not Kind.PROGRESS:
                return frame
            if (news := decode(frame, Progress).activity) != activity:
                activity = news
                logger.info("The follower on %s is %s.", hello.host, activity)

    def _further_lane(self, name: str, session: str) -> Lane:
        """Another connection of the session. One of a session that was given up may still be on its way here."""
        end = time.monotonic() + GREETING_TIMEOUT
        while True:
            try:
                hello, lane = self._further[name].get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise PeerLostError(
                    f"it did not open the connection for {name} within {GREETING_TIMEOUT:g} s"
                ) from None
            if hello.session == session:
                return lane
            lane.close()

    def _release(self, claimant: Hello | None = None) -> None:
        """Gives the place free, if `claimant` has it (default: whoever has it)."""
        with self._lock:
            if claimant is not None and self._claimant is not claimant:
                return
            self._claimant = None
        for lanes in self._further.values():
            with contextlib.suppress(queue.Empty):  # another thread may empty it too
                while True:
                    lanes.get_nowait()[1].close()

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
                reason = without_stop(str(error))
                self._turned_away.warning(address[0], reason, f"Turned away a connection from {address[0]}: {reason}.")
                connection.close()
                self._greeters.release()

    def _greet(self, plain: socket.socket, peer: str) -> None:
        lane: Lane | None = None
        hello: Hello | None = None
        try:
            connection = TlsConnection(plain, self._context, server_side=True, timeout=GREETING_TIMEOUT)
            lane = Lane(connection, peer, _GREETING_LIMIT)
            if (role := lane.peer_role) != "follower":
                raise ChannelError(f"it authenticated as {role!r}, not as a follower")
            hello = decode(lane.expect(Kind.HELLO, timeout=GREETING_TIMEOUT), Hello)
            if hello.lane not in LANES:
                raise ChannelError(f"it asked for a lane {hello.lane!r}, which does not exist")
            if refusal := self._judge(hello):
                lane.send(Kind.REFUSAL, msgspec.json.encode(refusal), timeout=GREETING_TIMEOUT)
                reason = refusal.sentence
                if self._is_news(hello.host, reason):
                    self._turned_away.warning(
                        peer, "refused", f"Refused a follower on {hello.host} (process {hello.process}): {reason}."
                    )
                self._last_problem = f"; the last one that came, from {hello.host}, was refused: {reason}"
                lane.close()
                return
            lane.send(Kind.WELCOME, msgspec.json.encode(Welcome(host_name(), os.getpid())), timeout=GREETING_TIMEOUT)
            lane.max_frame = self._max_frame
            lane.peer = f"the follower on {hello.host}"
            (self._control if hello.lane == CONTROL else self._further[hello.lane]).put((hello, lane))
        except (OSError, SparkError) as error:
            # Port scanners, other secrets, broken clients: worth a line, never worth the server.
            reason = failure_in_words(error)
            self._turned_away.warning(peer, reason, f"Turned away a connection from {peer}: {reason}.")
            self._last_problem = f"; the last one that came, from {peer}, was turned away: {reason}"
            if hello is not None:
                self._release(hello)
            if lane is not None:
                lane.close()
            plain.close()
        finally:
            self._greeters.release()

    def _is_news(self, host: str, sentence: str) -> bool:
        """Whether that host's follower is refused for another reason than before: it comes again and again."""
        with self._lock:
            former = self._refusals.get(host)
            self._refusals[host] = without_numbers(sentence)
            return former != self._refusals[host]

    def _judge(self, hello: Hello) -> Reason | None:
        """Why `hello` is refused; None if it is taken, in which case its session holds the place."""
        if self._versions and (difference := self._versions.difference(hello.versions, "the leader", "the follower")):
            return Reason(difference, final=True)
        with self._lock:
            if hello.lane != CONTROL:
                if self._claimant is None or self._claimant.session != hello.session:
                    return Reason("its session is not the one that was accepted")
                return None
            if self._claimant is not None:
                held = time.monotonic() - self._claimed_at
                return Reason(
                    f"this leader has a follower already, on {self._claimant.host} "
                    f"(process {self._claimant.process}), for {held:.0f} s; stop that one first"
                )
            self._claimant, self._claimed_at = hello, time.monotonic()
            return None
