"""The leader's end of a working pair: finds the follower, calls it, and knows why it broke.

Knows nothing of vLLM but that its configuration and its calls can be pickled.
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
from vllm_spark.backend.status import CounterBoard
from vllm_spark.collective.launch_table import load_launch_table
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import PeerLeftError, PeerLostError, RefusedError, SparkError, described, upper_first
from vllm_spark.executor.bootstrap import (
    Assignment,
    LinkInterface,
    connect_runtime,
    link_patience,
    use_link_interface,
    with_wire_model,
)
from vllm_spark.executor.channel.addresses import interface_of, is_loopback, leader_address
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.exposure import EXPOSED, shared_network
from vllm_spark.executor.channel.framing import MIB, ChannelError, FrameTooLargeError, Kind
from vllm_spark.executor.channel.secret import load_secret
from vllm_spark.executor.counters import local_counters
from vllm_spark.executor.environment import travelling_variables
from vllm_spark.executor.group_connection import GroupLink
from vllm_spark.executor.handshake.messages import Offer, Reason
from vllm_spark.executor.handshake.server import Follower, Listener
from vllm_spark.executor.heartbeat import Pulse, cause_grace
from vllm_spark.executor.pickling import dumps_by_value
from vllm_spark.executor.rpc import RemoteError, decode_reply, encode_call, replied_number
from vllm_spark.executor.token_check import TokenLedger
from vllm_spark.ranks import LEADER_RANK

logger = logging.getLogger("vllm_spark")

_REMEDY = "see what vllm-spark join printed there, start it again if it ended, and then this server"
_ASSIGNMENT_TIMEOUT = 60.0
_OWED_TIMEOUT = 600.0  # seconds for the answer of a call that was given up, once the next step needs the follower
_SETTLE_TIMEOUT = 20.0  # seconds that one rank may work on after the other failed in the same call


class Pair:
    """A leader and its follower at work. Made by `form`, ended by `close` or by a failure.

    Its methods may be called from one thread at a time; a failure comes from any.
    """

    def __init__(self, config: SparkConfig, listener: Listener, follower: Follower, board: CounterBoard) -> None:
        self.ledger = TokenLedger()
        self._listener, self._follower, self._board = listener, follower, board
        self._runtime: collective.Runtime | None = None
        self.groups = GroupLink(follower.groups, self.fail)
        self._interface: LinkInterface | None = None
        self._failure: SparkError | None = None
        self._failed = threading.Event()
        self._fail_lock = threading.Lock()
        self._on_failure: list[Callable[[], None]] = []
        self._closing = False
        self._asked = 0  # the number of the last call that is answered
        self._owed = False  # whether the answer of the last `ask` has not come yet
        self._asked_at: float | None = None  # when it was sent, while its answer is awaited
        self._running_model = False
        self._pulse = Pulse(
            follower.control,
            config.heartbeat_timeout,
            report=self._report,
            on_report=self._take_report,
            on_end=self.fail,
            on_link=self._take_announcement,
            patience=lambda: link_patience(self._runtime, config),
        )

    @classmethod
    def form(cls, config: SparkConfig, offer: Offer, vllm_config: Any, board: CounterBoard) -> Pair:
        """Waits for a follower that has the offered model, hands it its work, and joins the collective runtimes.

        Raises:
            SparkError: nobody came in time, or the two sides do not fit.
        """
        board.clear()
        address = leader_address(config)
        context = tls_context(load_secret(config, address), "leader")
        _warn_of_others(address)
        listener = Listener(address, config.port, context, config.max_frame_mib * MIB, config.secret_file)
        try:
            follower = listener.wait_for_follower(offer, config.join_timeout)
        except BaseException:
            listener.close()
            raise
        logger.info("%s joined.", upper_first(follower.name))
        pair = cls(config, listener, follower, board)
        pair._pulse.start()
        try:
            with pair.explained():
                pair._start_work(config, address, vllm_config)
        except BaseException:
            pair.close("the leader's start failed")
            raise
        board.begin_work()
        return pair

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Has the follower run a worker method of the decode loop; it does not answer.

        Raises:
            SparkError: the pair is broken.
        """
        if not self._running_model:
            self._running_model = True
            self._pulse.model_runs()
        if self._owed:
            # The follower comes to no call before it has sent that answer, which the connection alone may not hold.
            try:
                self._answer(_OWED_TIMEOUT)
            except RemoteError:
                pass  # of a call whose caller has gone on
            except TimeoutError:
                self.fail(
                    SparkError(
                        f"{self._follower.name} did not come back from a call that was given up, within "
                        f"{_OWED_TIMEOUT:g} s of the next step; see its log, and make a new engine"
                    )
                )
        self._send(Kind.CALL, method, args, kwargs)

    def ask(self, method: str | Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Has the follower run a worker method whose result `answer` returns.

        Raises:
            SparkError: the pair is broken.
        """
        self._send(Kind.QUERY, method, args, kwargs, self._asked + 1)
        self._owed = True
        self._asked += 1
        self._asked_at = time.monotonic()

    def answer(self, timeout: float | None) -> Any:
        """The result of the last `ask`; answers to those before it that were given up are dropped.

        Raises:
            RemoteError: the follower's worker raised; the log has its traceback.
            TimeoutError: no answer came within `timeout` seconds; the pair works on.
            SparkError: the pair broke.
        """
        try:
            return self._answer(timeout)
        except RemoteError as error:
            logger.error("%s failed:\n%s", upper_first(self._follower.name), error.details)
            raise

    def _answer(self, timeout: float | None) -> Any:
        deadline = None if timeout is None else time.monotonic() + timeout
        lane = self._follower.calls
        try:
            while True:
                # What has begun to come is read to its end: half a message would leave the lane useless.
                if deadline is not None and not lane.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"{self._follower.name} did not answer in time")
                payload = lane.expect(Kind.REPLY).payload
                if replied_number(payload) == self._asked:
                    self._owed = False
                    return decode_reply(payload)
        finally:
            self._asked_at = None

    def settle(self, error: BaseException) -> None:
        """Fetches and drops the answer of the last `ask`, after this rank failed in it.

        The follower may wait in a collective for what this rank will not do; if it does not come back, the pair ends.
        """
        try:
            self._answer(_SETTLE_TIMEOUT)
        except RemoteError:
            return
        except (SparkError, TimeoutError):
            self.fail(SparkError(f"the leader's worker failed: {described(error)}"))

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Replaces an error by its cause, if the control lane knows it: what surfaces first is often a symptom."""
        try:
            yield
        except RefusedError:
            raise  # it is its own cause
        except Exception as error:
            self._failed.wait(cause_grace(error))
            if isinstance(error, ChannelError | FrameTooLargeError):
                self.fail(error)
            if self._failure is not None and self._failure is not error:
                raise self._failure from error
            raise

    @contextlib.contextmanager
    def uninterrupted(self, work: str) -> Iterator[None]:
        """Ends the pair if the body, in which both ranks do `work`, is interrupted: the follower goes on with it."""
        try:
            yield
        except Exception:
            raise
        except BaseException as error:
            self.fail(SparkError(f"the leader was interrupted in {work} ({type(error).__name__}); make a new engine"))
            raise

    def check(self) -> None:
        """Raises the reason if the pair is broken."""
        if self._failure is not None:
            raise self._failure

    @property
    def failed(self) -> bool:
        """True once the pair is broken."""
        return self._failed.is_set()

    def record(self, output: Any) -> None:
        """Puts what a step sampled into the ledger.

        Raises:
            CollectiveError: a kernel of the step gave up, so that its tokens are worth nothing.
            DriftError: the follower sampled other tokens.
        """
        self.runtime.check()
        self.ledger.record(output)

    @property
    def runtime(self) -> collective.Runtime:
        """This rank's end of the collectives."""
        assert self._runtime is not None
        return self._runtime

    def on_failure(self, callback: Callable[[], None]) -> None:
        """`callback` is called once when the pair breaks, at once if it has."""
        with self._fail_lock:  # either `fail` finds it in the list, or this finds the failure
            broken = self._failed.is_set()
            if not broken:
                self._on_failure.append(callback)
        if broken:
            callback()

    def fail(self, error: SparkError) -> None:
        """Ends everything that waits, once, for the reason `error`. Called from any thread."""
        if isinstance(error, PeerLostError):
            error = PeerLostError(f"{error}; {_REMEDY}")
        with self._fail_lock:  # both threads may see the follower go
            if self._failed.is_set() or self._closing:
                return
            self._failure = error
            self._failed.set()
        logger.error("Serving ends: %s.", error)
        self._listener.close()  # whoever comes now shall wait for the next leader
        self._board.fail(error)
        if self._runtime is not None:
            self._runtime.abort(str(error))
        self._follower.calls.interrupt()
        self.groups.fail(error)
        for callback in self._on_failure:
            callback()

    @property
    def closing(self) -> bool:
        """True once the follower is told that this is the end."""
        return self._closing

    def leave(self, farewell: str) -> None:
        """Tells the follower why, and ends all waits; nothing is released that another thread may still use."""
        self._closing = True
        self._pulse.stop(Reason(farewell))
        if self._runtime is not None:
            self._runtime.abort(farewell)

    def close(self, farewell: str) -> None:
        """Tells the follower why, and releases everything; may be called again."""
        if self._closing:
            return
        self.leave(farewell)
        self._listener.close()
        self._follower.calls.close()
        self._follower.control.close()
        self.groups.close(PeerLeftError(farewell))
        if self._runtime is not None:
            self._runtime.close()
        if self._interface is not None:
            self._interface.forget()

    def _start_work(self, config: SparkConfig, address: str, vllm_config: Any) -> None:
        launch, config = load_launch_table(config.launch_table), with_wire_model(config)
        assignment = Assignment(vllm_config, config, launch, travelling_variables(os.environ))
        self._follower.calls.send(Kind.ASSIGNMENT, dumps_by_value(assignment), timeout=_ASSIGNMENT_TIMEOUT)
        self._interface = use_link_interface(address, address)
        self._runtime = connect_runtime(
            LEADER_RANK, config, launch, self._follower.calls, self._pulse.announce, config.rails
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
        self._follower.calls.send(kind, encode_call(self.ledger.state(), method, args, kwargs, number))

    def _take_report(self, theirs: dict[str, Any]) -> None:
        self._board.write(theirs["counters"])
        asked_at = self._asked_at
        waited = 0.0 if asked_at is None or theirs["failed_number"] != self._asked else time.monotonic() - asked_at
        if waited > _SETTLE_TIMEOUT:
            # This rank does not fetch the answer: it waits in a collective that the follower does not come to.
            self.fail(RemoteError(f"{self._follower.name} ends the work: {theirs['failed_call']}"))

    def _take_announcement(self, announcement: bytes) -> None:
        if self._runtime is not None:
            self._runtime.deliver(announcement)

    def _report(self) -> dict[str, Any]:
        step, digest = self.ledger.state()
        self._board.write(local_counters(LEADER_RANK, (step, digest)))
        return {"step": step, "digest": digest.hex()}


def _warn_of_others(address: str) -> None:
    """One line if others than the follower may reach the link."""
    interface = None if is_loopback(address) else interface_of(address)
    if interface is not None and (reason := shared_network(interface)):
        logger.warning(
            "The link's address %s is on %s, which %s. %s; join both machines with a cable of their own, and give its "
            "address with --spark-address.",
            address,
            interface,
            reason,
            EXPOSED,
        )
