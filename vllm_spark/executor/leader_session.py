"""The leader's side of a session: accepts the follower, sends it calls, and records why the session failed.

Depends on vLLM only in that its configuration and the arguments of its calls can be pickled.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from vllm_spark import collective
from vllm_spark.backend.pair_status.readings import Sensors
from vllm_spark.backend.start_step import LOADING, step_of, unfinished, with_steps
from vllm_spark.backend.status import EngineStatus
from vllm_spark.collective.launch_table import load_launch_table
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import PeerLeftError, PeerLostError, RefusedError, SparkError, described, upper_first
from vllm_spark.executor.bootstrap import (
    Assignment,
    LinkInterface,
    connect_runtime,
    link_tolerance,
    modelled_wire,
    use_link_interface,
)
from vllm_spark.executor.channel.addresses import interface_of, is_loopback, leader_address
from vllm_spark.executor.channel.exposure import EXPOSED, shared_network
from vllm_spark.executor.channel.framing import ChannelError, FrameTooLargeError, Kind
from vllm_spark.executor.counters import local_counters
from vllm_spark.executor.environment import sent_variables
from vllm_spark.executor.group_connection import GroupConnection
from vllm_spark.executor.handshake.messages import Offer, Reason
from vllm_spark.executor.handshake.server import Follower, Listener, listener_at
from vllm_spark.executor.heartbeat import FollowerReport, Heartbeat, LeaderReport, cause_grace
from vllm_spark.executor.model_sync.sender import ModelSender
from vllm_spark.executor.pickling import dumps_by_value
from vllm_spark.executor.rpc import (
    CLOCK,
    CLOCK_SPIN,
    CLOCK_TIMEOUT,
    SILENT_METHODS,
    SILENT_SECONDS,
    TRACE_CLOCK,
    WARM_UP,
    RemoteError,
    decode_reply,
    encode_call,
    replied_number,
)
from vllm_spark.executor.token_check import TokenDigest
from vllm_spark.ranks import FOLLOWER_RANK, LEADER_RANK
from vllm_spark.recording.clock_offset import RoundTrip

logger = logging.getLogger("vllm_spark")

_REMEDY = "see what vllm-spark join printed there, start it again if it ended, and then this server"
_ASSIGNMENT_TIMEOUT = 60.0
_DRAIN_TIMEOUT = 600.0  # seconds for the reply to a call that timed out, once the next step needs the follower
_REPLY_TIMEOUT_AFTER_ERROR = 20.0  # seconds for one rank to finish a call in which the other failed


class LeaderSession:
    """A session with one follower. Made by `start`, ended by `close` or by a failure.

    Its methods may be called from one thread at a time; `fail` from any.
    """

    def __init__(
        self,
        config: SparkConfig,
        listener: Listener,
        follower: Follower,
        status: EngineStatus,
        sender: ModelSender | None = None,
    ) -> None:
        self.token_digest = TokenDigest()
        self.sender = sender or ModelSender()
        """Sends files that the follower lacks."""
        self._listener, self._follower, self._status = listener, follower, status
        self._runtime: collective.Runtime | None = None
        self.groups = GroupConnection(follower.groups, self.fail)
        self._interface: LinkInterface | None = None
        self._failure: SparkError | None = None
        self._failed = threading.Event()
        self._fail_lock = threading.Lock()
        self._on_failure: list[Callable[[], None]] = []
        self._closing = False
        self._sensors = Sensors()
        self._last_query = 0  # the number of the last QUERY
        self._reply_pending = False  # whether the reply to the last `ask` is outstanding
        self._query_time: float | None = None  # when it was sent, while `answer` waits for its reply
        self._query_name = ""
        self._caller: int | None = None  # the thread that sent it
        self._own_end: float | None = None  # when this rank has finished it
        self._their_end: float | None = None  # when the follower had, according to its heartbeats
        self._their_step = ""  # the step of vLLM's start in which the follower is
        self._collective_timeout = config.collective_timeout
        self._starting = True  # until both ranks have finished vLLM's last call of a start
        self._running_model = False
        self._call_tolerance = 0.0  # until the reply to one of SILENT_METHODS
        self._heartbeat = Heartbeat(
            follower.control,
            config.heartbeat_timeout,
            report=self._report,
            peer_report=FollowerReport,
            on_report=self._take_report,
            on_end=self.fail,
            on_link=self._take_announcement,
            tolerance=lambda: max(self._call_tolerance, link_tolerance(self._runtime, config)),
        )

    @classmethod
    def start(cls, config: SparkConfig, offer: Offer, vllm_config: Any, status: EngineStatus) -> LeaderSession:
        """Waits for a follower with the offered model, sends it its assignment, and connects the collective runtimes.

        Raises:
            SparkError: no follower connected in time, or the two sides do not fit.
        """
        status.clear()
        address = leader_address(config)
        sender = ModelSender()
        sender.offer(offer.files)
        listener = listener_at(address, config, serve_copy=sender.serve if offer.sends_files else None)
        try:
            _warn_if_shared(address)
            follower = listener.wait_for_follower(offer, config.join_timeout, sender.changed)
        except BaseException:
            listener.close()
            sender.close()
            raise
        logger.info("%s joined.", upper_first(follower.name))
        session = cls(config, listener, follower, status, sender)
        session._heartbeat.start()
        session._sensors.start()
        try:
            with session.explained():
                session._start_work(config, address, vllm_config)
        except BaseException:
            session.close("the leader's start failed")
            raise
        status.mark_started()
        return session

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Has the follower run a worker method of the decode loop, which has no reply.

        Raises:
            SparkError: the session is over.
        """
        if not self._running_model:
            self._running_model = True
            self._heartbeat.model_started()
        if self._reply_pending:
            self._await_pending_reply()
        if self._runtime is not None:
            self._runtime.wake_proxy()  # this rank's worker runs the same method next
        self._send(Kind.CALL, method, args, kwargs)

    def _await_pending_reply(self) -> None:
        """Receives the reply to a call that timed out.

        The follower sends it before it reads another message, and the socket's buffers may not hold it.
        """
        try:
            self._answer(_DRAIN_TIMEOUT)
        except RemoteError:
            pass  # the caller has timed out already
        except TimeoutError:
            self.fail(
                SparkError(
                    f"{self._follower.name} has not finished a call that timed out, {_DRAIN_TIMEOUT:g} s after the "
                    "next step was due; see its log, and make a new engine"
                )
            )

    def ask(self, method: str | Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Has the follower run a worker method; `answer` returns its result.

        Raises:
            SparkError: the pair is broken.
        """
        self._call_tolerance = SILENT_SECONDS if method in SILENT_METHODS else 0.0
        self._send(Kind.QUERY, method, args, kwargs, self._last_query + 1)
        self._reply_pending = True
        self._last_query += 1
        self._query_name = method if isinstance(method, str) else ""
        self._caller = threading.get_ident()
        self._own_end = self._their_end = None
        self._query_time = time.monotonic()

    def compare_clocks(self, count: int) -> list[RoundTrip]:
        """Exchanges `count` short messages with the follower, as fast as both can.

        Raises:
            SparkError: the session is over, or the channel broke.
        """
        if self._reply_pending:
            self._await_pending_reply()
        connection, trips = self._follower.rpc, []
        self.ask(TRACE_CLOCK, (count,), {})
        for _ in range(count):
            sent = time.monotonic_ns()
            connection.send(Kind.CLOCK, timeout=CLOCK_TIMEOUT)
            frame = connection.expect(Kind.CLOCK, timeout=CLOCK_TIMEOUT, spin=CLOCK_SPIN)
            arrived = time.monotonic_ns()
            received, answered = CLOCK.unpack(frame.payload)
            trips.append(RoundTrip(sent, received, answered, arrived))
        self.answer(CLOCK_TIMEOUT)
        return trips

    def own_part_done(self) -> None:
        """This rank has finished the call that the last `ask` sent."""
        self._own_end = time.monotonic()

    def with_steps(self, error: Exception) -> Exception:
        """As `start_step.with_steps`, of this session."""
        return with_steps(error, "rank 0", "rank 1", self._their_step)

    def answer(self, timeout: float | None) -> Any:
        """The result of the last `ask`; replies to earlier calls that timed out are dropped.

        Raises:
            RemoteError: the follower's worker raised; the log has its traceback.
            TimeoutError: no reply came within `timeout` seconds; the session goes on.
            SparkError: the session failed.
        """
        try:
            result = self._answer(timeout)
            self._starting = self._starting and self._query_name != WARM_UP
            return result
        except RemoteError as error:
            logger.error("%s failed:\n%s", upper_first(self._follower.name), error.details)
            raise

    def _answer(self, timeout: float | None) -> Any:
        deadline = None if timeout is None else time.monotonic() + timeout
        connection = self._follower.rpc
        try:
            while True:
                # Once a frame has begun to arrive it is read completely: after half a frame the connection is unusable.
                if deadline is not None and not connection.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"{self._follower.name} did not answer in time")
                payload = connection.expect(Kind.REPLY).payload
                if replied_number(payload) == self._last_query:
                    self._reply_pending, self._call_tolerance = False, 0.0
                    return decode_reply(payload)
        finally:
            self._query_time = None

    def drain_reply(self, error: BaseException) -> bool:
        """Receives and drops the reply to the last `ask`, after this rank failed in the same call.

        The follower may wait in a collective that this rank does not call; if it does not reply, the session fails.

        Returns:
            Whether the call succeeded on the follower.
        """
        try:
            self._answer(_REPLY_TIMEOUT_AFTER_ERROR)
        except RemoteError:
            return False
        except (SparkError, TimeoutError):
            self._fail_both(SparkError(f"the leader's worker failed: {described(error)}"))
            return False
        return True

    @contextlib.contextmanager
    def explained(self, *, step: bool = False) -> Iterator[None]:
        """Replaces an error by its cause, if the control connection reports one: the first error is often a symptom.

        Args:
            step: whether the body is a step, after whose failure the ranks cannot go on: then the session fails, too.
        """
        try:
            yield
        except RefusedError:
            raise  # it is the cause itself
        except Exception as error:
            self._failed.wait(cause_grace(error))
            if isinstance(error, ChannelError | FrameTooLargeError):
                self.fail(error)
            elif step and not self._failed.is_set():
                self._fail_both(SparkError(f"the leader's worker failed: {described(error)}"))
            if self._failure is not None and self._failure is not error:
                raise self._failure from error
            raise

    @contextlib.contextmanager
    def uninterrupted(self, work: str) -> Iterator[None]:
        """Ends the session if the body, in which both ranks do `work`, is interrupted on this one."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception):
                name = type(error).__name__
                self.fail(SparkError(f"the leader was interrupted in {work} ({name}); make a new engine"))
            raise

    def check(self) -> None:
        """Raises the reason if the session has failed."""
        if self._failure is not None:
            raise self._failure

    @property
    def failed(self) -> bool:
        """True once the session has failed."""
        return self._failed.is_set()

    def record_step(self, output: Any) -> None:
        """Adds the tokens that a step sampled or drafted to this rank's digest.

        Raises:
            CollectiveError: a kernel of the step failed, so that its tokens are invalid.
            DriftError: the follower sampled or drafted other tokens.
        """
        self.runtime.check()
        self.token_digest.update(output)

    @property
    def runtime(self) -> collective.Runtime:
        """This rank's end of the collectives."""
        assert self._runtime is not None
        return self._runtime

    @property
    def endpoint(self) -> str:
        """Where this leader listens for its follower."""
        return self._listener.endpoint

    def on_failure(self, callback: Callable[[], None]) -> None:
        """`callback` is called once when the session fails, at once if it has."""
        with self._fail_lock:  # either `fail` sees it in the list, or this sees the failure
            broken = self._failed.is_set()
            if not broken:
                self._on_failure.append(callback)
        if broken:
            callback()

    def fail(self, error: SparkError) -> None:
        """Ends all waits with the reason `error`; only the first call counts. From any thread."""
        if isinstance(error, PeerLostError):
            error = PeerLostError(f"{error}; {_REMEDY}")
        with self._fail_lock:  # several threads may see that the follower is lost
            if self._failed.is_set() or self._closing:
                return
            self._failure = error
            self._failed.set()
        logger.error("Serving ends: %s.", error)
        self._listener.close()  # further followers wait for the next leader
        self.sender.close()
        self._status.fail(error)
        if self._runtime is not None:
            self._runtime.abort(str(error))
        self._follower.rpc.interrupt()
        self.groups.fail(error)
        for callback in self._on_failure:
            callback()

    def _fail_both(self, error: SparkError) -> None:
        """`fail`, and the follower gets the reason before its collectives end, which follows from it."""
        self._heartbeat.send(Kind.FAILURE, Reason(str(error)))
        self.fail(error)

    @property
    def closing(self) -> bool:
        """True once the follower has been sent the end of the session."""
        return self._closing

    def leave(self, reason: str) -> None:
        """Sends the follower the reason, and ends all waits; releases nothing that another thread may still use."""
        self._closing = True
        self._sensors.stop()
        self._heartbeat.stop(Reason(reason))
        if self._runtime is not None:
            self._runtime.abort(reason)

    def close(self, reason: str) -> None:
        """Sends the follower the reason, and releases everything; may be called again."""
        if self._closing:
            return
        self.leave(reason)
        self._listener.close()
        self.sender.close()
        self._follower.rpc.close()
        self._follower.control.close()
        self.groups.close(PeerLeftError(reason))
        if self._runtime is not None:
            self._runtime.close()
        if self._interface is not None:
            self._interface.restore()

    def _start_work(self, config: SparkConfig, address: str, vllm_config: Any) -> None:
        launch, wire = load_launch_table(config.launch_table), modelled_wire(config)
        assignment = Assignment(vllm_config, config, launch, sent_variables(os.environ), wire)
        self._follower.rpc.send(Kind.ASSIGNMENT, dumps_by_value(assignment), timeout=_ASSIGNMENT_TIMEOUT)
        self._interface = use_link_interface(address)
        self._runtime = connect_runtime(
            LEADER_RANK, config, launch, self._follower.rpc, self._heartbeat.announce, config.rails, wire
        )

    def _send(
        self,
        kind: Kind,
        method: str | Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        number: int = 0,
    ) -> None:
        self.check()
        self._follower.rpc.send(kind, encode_call(self.token_digest.state(), method, args, kwargs, number))

    def _take_report(self, theirs: FollowerReport) -> None:
        self._status.write(theirs.counters)
        self._status.write_readings(FOLLOWER_RANK, theirs.readings)
        asked_at = self._query_time
        waited = 0.0 if asked_at is None or theirs.failed_number != self._last_query else time.monotonic() - asked_at
        if waited > _REPLY_TIMEOUT_AFTER_ERROR:
            # This rank cannot receive the reply: it waits in a collective that the follower does not call.
            self.fail(RemoteError(f"{self._follower.name} failed: {theirs.failed_call}"))
        self._their_step = theirs.start_step
        if self._starting and asked_at is not None:
            self._check_start(theirs, time.monotonic())

    def _check_start(self, theirs: FollowerReport, now: float) -> None:
        """Fails a start in which one rank has finished a call and the other one has not for the collectives' time-out.

        Such as for a lock that a killed process has left: such a wait is not a collective, which would time out.
        """
        if theirs.answered == self._last_query and self._their_end is None:
            self._their_end = now
        if theirs.start_step == LOADING and self._own_end is not None:
            self._own_end = now  # it has not begun: loading a model takes as long as its disk does
        if self._own_end is not None and self._their_end is None and now - self._own_end > self._collective_timeout:
            step = theirs.start_step or self._query_name
            self._fail_both(SparkError(unfinished(self._follower.name, step, self._collective_timeout)))
        if self._their_end is not None and self._own_end is None and now - self._their_end > self._collective_timeout:
            step = step_of(self._caller) or self._query_name
            self._fail_both(SparkError(unfinished("the leader", step, self._collective_timeout)))

    def _take_announcement(self, announcement: bytes) -> None:
        if self._runtime is not None:
            self._runtime.deliver(announcement)

    def _report(self) -> LeaderReport:
        step, digest = self.token_digest.state()
        self._status.write(local_counters(LEADER_RANK, (step, digest)))
        self._status.write_readings(LEADER_RANK, self._sensors.readings)
        return LeaderReport(step, digest.hex(), step_of(self._caller) if self._starting else "")


def _warn_if_shared(address: str) -> None:
    """Warns if other machines than the follower's may be on the link."""
    interface = None if is_loopback(address) else interface_of(address)
    if interface is not None and (reason := shared_network(interface)):
        logger.warning(
            "The link's address %s is on %s, which %s. %s; connect both machines with a separate cable, and give its "
            "address with --spark-address.",
            address,
            interface,
            reason,
            EXPOSED,
        )
