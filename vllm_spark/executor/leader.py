"""The leader's half: one scheduler, its own rank in this process, the other rank across the link.

`SparkExecutor` is vLLM's external-launcher executor with the launcher inside: before a worker method runs here,
the call is sent to the follower, which runs it there.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher, UniProcExecutor
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.serial_utils import run_method

from vllm_spark.config import SparkConfig
from vllm_spark.errors import EXIT_LOST, PeerLostError, SparkError
from vllm_spark.executor.calls import STEP_METHODS, decode_reply, encode_call
from vllm_spark.executor.channel import MIB, ChannelError, Kind
from vllm_spark.executor.counters import CounterBoard, local_counters
from vllm_spark.executor.credentials import load_secret, tls_context
from vllm_spark.executor.handshake import Listener, Offer, Reason
from vllm_spark.executor.link import leader_address
from vllm_spark.executor.lockstep import TokenLedger, WorkerRandomState
from vllm_spark.executor.model_identity import ModelIdentity, find_model
from vllm_spark.executor.pulse import Pulse
from vllm_spark.executor.session import (
    Assignment,
    connect_runtime,
    prepare_process_group,
    serve_store,
    travelling_environment,
)
from vllm_spark.settings import settings_of

logger = logging.getLogger("vllm_spark")

LEADER_RANK = 0

_CAUSE_GRACE = 0.5  # seconds in which the control lane may explain an error that surfaced elsewhere first
_LAST_RESORT = 3.0  # seconds after a loss in which the engine may end by itself


class SparkExecutor(ExecutorWithExternalLauncher):
    """Runs rank 0 in this process and rank 1 on the follower."""

    def _init_executor(self) -> None:
        """Finds the follower, hands it its work, and loads this rank's half of the model.

        Raises:
            SparkError: no follower came, or it does not fit; the sentence says why. An engine in a process of its
                own leaves the sentence for the API server and ends instead, which spares the user vLLM's traceback.
        """
        self._board = CounterBoard.from_environment()
        try:
            self._start()
        except SparkError as error:
            if _parent_process() is None:
                self.shutdown()
                raise
            self._board.fail(error)
            logger.error("The engine does not start: %s.", error)
            os._exit(error.exit_code)

    def _start(self) -> None:
        from vllm_spark.activation import share_vllms_log
        from vllm_spark.platform import activate

        share_vllms_log()
        self.driver_worker = None
        self._failure: SparkError | None = None
        self._failure_callback: Callable[[], None] | None = None
        self._failed = threading.Event()
        self._call_lock = threading.Lock()
        self._ledger = TokenLedger()
        self._running_model = False
        self._config = settings_of(self.vllm_config)

        activate()
        self._join_follower(self._config)
        self._random_state = WorkerRandomState()
        with self._explained(), self._random_state:
            UniProcExecutor._init_executor(self)

    def _join_follower(self, config: SparkConfig) -> None:
        address = leader_address(config)
        context = tls_context(load_secret(config, address), "leader")
        self._listener = Listener(address, config.port, context, config.max_frame_mib * MIB)
        model = self.vllm_config.model_config
        dummy = str(self.vllm_config.load_config.load_format) == "dummy"
        offer = Offer(
            model=model.model,
            revision=model.revision,
            load_format=str(self.vllm_config.load_config.load_format),
            identity=ModelIdentity.of(find_model(model.model, model.revision), with_weights=not dummy),
            heartbeat_timeout=config.heartbeat_timeout,
        )
        self._follower = self._listener.wait_for_follower(offer, config.join_timeout, self._announce_waiting)
        logger.info("%s joined.", self._follower.name.capitalize())
        self._pulse = Pulse(
            self._follower.control,
            config.heartbeat_timeout,
            report=self._report,
            on_report=lambda theirs: self._board.write(theirs["counters"]),
            on_end=self._peer_ended,
            parent=_parent_process(),
        )
        self._pulse.start()

        self._store = serve_store(address)
        assignment = Assignment(
            vllm_config=self.vllm_config,
            config=config,
            environment=travelling_environment(),
            store_address=address,
            store_port=self._store.port,
        )
        self._follower.calls.send(Kind.ASSIGNMENT, pickle.dumps(assignment), timeout=60.0)
        prepare_process_group(LEADER_RANK, address, self._store.port, address)
        with self._explained():
            self._runtime = connect_runtime(LEADER_RANK, config, self._follower.calls)

    def _announce_waiting(self, waited: float) -> None:
        logger.info(
            "Waiting for the follower at %s (%.0f s of %.0f s). On the other machine run: vllm-spark join --leader %s",
            self._listener.endpoint,
            waited,
            self._config.join_timeout,
            self._listener.endpoint,
        )

    def _distributed_args(self) -> tuple[str, int, int]:
        return "env://", LEADER_RANK, 0

    def collective_rpc(  # type: ignore[override]
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        single_value: bool = False,
    ) -> Any:
        """Runs `method` on both ranks.

        The calls of the decode loop return this rank's result; any other returns both ranks', in rank order.

        Raises:
            SparkError: the follower is lost, or its worker failed.
        """
        with self._call_lock:
            if method in STEP_METHODS:
                outcome = self._step(str(method), args, kwargs or {}, non_block)
                if single_value:
                    return outcome
                return _mapped(outcome, lambda value: [value]) if non_block else [outcome]
            results = self._query(method, timeout, args, kwargs or {})
        value = results[0] if single_value else results
        return _finished(value) if non_block else value

    def _step(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], non_block: bool) -> Any:
        if not self._running_model:
            self._running_model = True
            self._pulse.model_runs()
        with self._explained():
            # Before it runs here: the worker changes its arguments in place.
            self._send(Kind.CALL, encode_call(self._ledger.state(), method, args, kwargs))
            with self._random_state:
                output = run_method(self.driver_worker, method, args, kwargs)
            if isinstance(output, AsyncModelRunnerOutput):
                return _StepFuture(output, self) if non_block else self._conclude(output.get_output())
            output = self._conclude(output)
            return _finished(output) if non_block else output

    def _query(
        self, method: str | Callable[..., Any], timeout: float | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any]:
        with self._explained():
            self._send(Kind.QUERY, encode_call(self._ledger.state(), method, args, kwargs))
            try:
                with self._random_state:
                    mine = run_method(self.driver_worker, method, args, kwargs)
                if isinstance(mine, AsyncModelRunnerOutput):
                    mine = mine.get_output()
            finally:
                # Also if this rank failed: an unread answer would be taken for the next call's.
                reply = self._follower.calls.expect(Kind.REPLY, timeout=timeout)
            return [mine, decode_reply(reply.payload)]

    def _conclude(self, output: Any) -> Any:
        """Notes what a step sampled, on its way to the scheduler."""
        if output is not None:
            self._ledger.record(output)
        return output

    def _send(self, kind: Kind, payload: bytes) -> None:
        if self._failure is not None:
            raise self._failure
        self._follower.calls.send(kind, payload)

    @contextlib.contextmanager
    def _explained(self) -> Any:
        """Replaces an error by its cause, if the control lane knows it: what surfaces first is often a symptom."""
        try:
            yield
        except Exception as error:
            self._failed.wait(_CAUSE_GRACE)
            if self._failure is not None and self._failure is not error:
                raise self._failure from error
            if isinstance(error, ChannelError):
                self._fail(error)
            raise

    def _report(self) -> dict[str, Any]:
        counters = local_counters(LEADER_RANK, self._ledger.state())
        self._board.write(counters)
        step, digest = self._ledger.state()
        return {"step": step, "digest": digest.hex()}

    def _peer_ended(self, error: SparkError | None) -> None:
        self._fail(error or PeerLostError(f"{self._follower.name} left"))

    def _fail(self, error: SparkError) -> None:
        """Ends everything that waits, once, for the reason `error`. Called from any thread."""
        if self._failed.is_set():
            return
        self._failure = error
        self._failed.set()
        logger.error("Serving ends: %s.", error)
        self._board.fail(error)
        runtime = getattr(self, "_runtime", None)
        if runtime is not None:
            runtime.abort(str(error))
        self._follower.calls.interrupt()
        if self._failure_callback is not None:
            self._failure_callback()
        if _parent_process() is not None:
            # Whatever the engine's thread is stuck in (a process group of torch, say), the process ends.
            threading.Thread(target=_end_process_soon, name="spark-last-resort", daemon=True).start()

    def check_health(self) -> None:
        """Raises the reason if the pair is broken."""
        if self._failure is not None:
            raise self._failure

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        """`callback` is called once if the pair breaks, also if it broke before."""
        self._failure_callback = callback
        if self._failure is not None:
            callback()

    def determine_available_memory(self) -> list[int]:
        """Free memory of both ranks in bytes, in rank order; vLLM takes the smaller."""
        return list(self.collective_rpc("determine_available_memory"))

    def shutdown(self) -> None:
        """Tells the follower, and releases everything; may be called again, and after a failed start."""
        listener, self._listener = getattr(self, "_listener", None), None
        if listener is None:
            return
        pulse = getattr(self, "_pulse", None)
        if pulse is not None:
            pulse.stop(Reason("the leader is shutting down"))
        listener.close()
        follower = getattr(self, "_follower", None)
        if follower is not None:
            follower.calls.close()
            follower.control.close()
        runtime = getattr(self, "_runtime", None)
        if runtime is not None:
            runtime.abort("the leader is shutting down")
            runtime.close()
        if self.driver_worker is not None:
            self.driver_worker.shutdown()


class _StepFuture(Future[Any]):
    """The result of a step whose tokens are still being copied from the device."""

    def __init__(self, output: AsyncModelRunnerOutput, executor: SparkExecutor) -> None:
        super().__init__()
        self._output, self._executor = output, executor

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the copy. A time-out is not supported: vLLM's own future has none either."""
        if not self.done():
            try:
                with self._executor._explained():
                    self.set_result(self._executor._conclude(self._output.get_output()))
            except Exception as error:
                self.set_exception(error)
        return super().result(timeout)


def _finished(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _mapped(future: Future[Any], change: Callable[[Any], Any]) -> Future[Any]:
    return _finished(change(future.result()))


def _parent_process() -> int | None:
    """The process that started this engine; None if the engine runs inside the user's own process."""
    parent = multiprocessing.parent_process()
    return None if parent is None else parent.pid


def _end_process_soon() -> None:
    time.sleep(_LAST_RESORT)
    os._exit(EXIT_LOST)
