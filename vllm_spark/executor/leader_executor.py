"""vLLM's executor on the leader: rank 0 in this process, rank 1 on the follower.

`SparkExecutor` extends vLLM's executor of one worker: before a worker method runs here, the call is sent to the
follower, which runs it too.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.serial_utils import run_method
from vllm.v1.worker.worker_base import WorkerWrapperBase

from vllm_spark.backend.ipc_folder import remove_socket_folder
from vllm_spark.backend.logging import use_vllm_logging
from vllm_spark.backend.memory_need import check_fits, memory_need, reserved_bytes
from vllm_spark.backend.pair_status.records import PairFacts
from vllm_spark.backend.pair_status.report import RankReport
from vllm_spark.backend.platform import activate
from vllm_spark.backend.status import EngineStatus
from vllm_spark.config.attachment import settings_of
from vllm_spark.errors import EXIT_LOST, RefusedError, SparkError, described
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.counters import local_counters
from vllm_spark.executor.environment import recorded_environment
from vllm_spark.executor.handshake.messages import Offer
from vllm_spark.executor.leader_session import LeaderSession
from vllm_spark.executor.model_files.adapters import ADD_LORA, LeaderAdapters
from vllm_spark.executor.model_files.loaded import (
    LoadedFiles,
    files_of,
    pin_load_formats,
    weight_paths,
    weights_to_reload,
)
from vllm_spark.executor.model_files.placement import place_on_leader
from vllm_spark.executor.rank_executor import RankExecutor
from vllm_spark.executor.rpc import (
    COMPARE_ADAPTER,
    COMPARE_FILES,
    DESCRIBE,
    EXECUTE,
    EXECUTE_THEN_SAMPLE,
    RELOAD_WEIGHTS,
    SAMPLE,
    STEP_METHODS,
    TRACE,
    WARM_UP,
    WEIGHT_METHODS,
    RemoteError,
)
from vllm_spark.executor.store import close_groups
from vllm_spark.executor.token_check import WorkerRandomState
from vllm_spark.executor.tracing.leader import LeaderTrace
from vllm_spark.kernels import runtime as tuning
from vllm_spark.memory.guard import MemoryGuard, raise_oom_score
from vllm_spark.processes.child import in_engine_process, watch_parent
from vllm_spark.processes.signals import ended_by_signals
from vllm_spark.ranks import LEADER_RANK
from vllm_spark.records import RecordError, from_json

logger = logging.getLogger("vllm_spark")

_COMPARE_TIMEOUT = 600.0  # seconds for the follower to search for an adapter's files
_DESCRIBE_TIMEOUT = 30.0  # seconds for the follower to describe itself
_EXIT_GRACE = 3.0  # seconds after a failure in which the engine may exit by itself


class SparkExecutor(RankExecutor):
    """Runs every worker method on both ranks; vLLM's scheduler runs on the leader only."""

    rank = LEADER_RANK

    def _init_executor(self) -> None:
        """Waits for the follower, sends it its assignment, and loads this rank's half of the model.

        Raises:
            SparkError: no follower connected, or it does not fit; the sentence says why.
        """
        global _unfinished
        abandon_unfinished_start()
        self._in_engine_process = in_engine_process()
        self.driver_worker = None
        self._session: LeaderSession | None = None
        self._call_lock = threading.Lock()
        self._sampling_announced = False
        self._started = self._ended = self._groups_opened = False
        self._adapters: LeaderAdapters | None = None
        self._guard: MemoryGuard | None = None
        self._trace: LeaderTrace | None = None
        self._had_groups = torch.distributed.is_initialized()
        self._status = EngineStatus.from_environment()
        use_vllm_logging()
        if self._in_engine_process:
            watch_parent(self._parent_died)
        else:
            _unfinished = self
        try:
            # In the user's own process, signal handlers stay the user's.
            with ended_by_signals() if self._in_engine_process else contextlib.nullcontext():
                self._start()
        except BaseException as error:
            self._abandon_start(error)
            raise

    def _start(self) -> None:
        activate()
        config, offer = settings_of(self.vllm_config), _offer(self.vllm_config)
        check_fits(offer.memory, config, host_name())
        self._session = LeaderSession.start(config, offer, self.vllm_config, self._status)
        # After the follower got the configuration with the names: each rank loads from the places that were compared.
        place_on_leader(self.vllm_config, offer.files)
        if self._in_engine_process:
            self._session.on_failure(_end_process_soon)
            raise_oom_score()
        self._guard = MemoryGuard(reserved_bytes(config), host_name(), self._memory_exhausted)
        self._guard.start()
        self._random_state = WorkerRandomState()
        self._groups_opened = True
        with self._session.explained(), self._random_state:
            self.load_worker(
                self._session.groups,
                self._session.runtime,
                weight_paths(offer.files),
                own_process=self._in_engine_process,
            )
        self._trace = LeaderTrace(config.trace == "on", self._session, _StepFuture)
        if self.vllm_config.lora_config is not None:
            self._adapters = LeaderAdapters(self._compare_files, self._loaded_adapters, self._load_adapter)

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        single_value: bool = False,
    ) -> Any:
        """Runs `method` on both ranks.

        Calls of the decode loop return only this rank's result; other calls return both ranks', in rank order.

        Raises:
            SparkError: the follower is lost, or its worker failed.
            TimeoutError: the follower did not reply within `timeout` seconds; the session goes on.
        """
        session = self._running_session()
        try:
            result = self._run(session, method, timeout, args, kwargs or {}, non_block, single_value)
        except BaseException as error:
            if not self._started:
                self._abandon_start(error)
            raise
        if method == WARM_UP:
            self._started = True
            _clear_unfinished(self)
            self._run(session, DESCRIBE, _DESCRIBE_TIMEOUT, (), {}, False, True)
        return result

    def _run(
        self,
        session: LeaderSession,
        method: str | Callable[..., Any],
        timeout: float | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        non_block: bool,
        single_value: bool,
    ) -> Any:
        explained = session.explained(step=method in STEP_METHODS)
        with self._call_lock, self._uninterrupted(session, method), explained:
            if self._adapters is not None and method in (ADD_LORA, EXECUTE):
                args, kwargs = self._with_own_adapters(session, self._adapters, str(method), args, kwargs)
            elif method == RELOAD_WEIGHTS:
                args, kwargs = self._with_compared_weights(args, kwargs)
            if method == COMPARE_ADAPTER:
                if self._adapters is not None:
                    self._adapters.compare(*args)
                result: Any = None if single_value else [None]
            elif method == DESCRIBE:
                self._record_facts(session, timeout)
                result = None if single_value else [None]
            elif method == TRACE:
                assert self._trace is not None
                answer = self._trace.answer(str(args[0]), self)
                result = answer if single_value else [answer]
            elif method in STEP_METHODS:
                output = self._step(session, str(method), args, kwargs, non_block)
                if isinstance(output, Future):
                    return output if single_value else _finished([output.result()])
                result = output if single_value else [output]
            else:
                results = self._query(session, method, timeout, args, kwargs)
                result = results[LEADER_RANK] if single_value else results
        return _finished(result) if non_block else result

    def _with_own_adapters(
        self,
        session: LeaderSession,
        adapters: LeaderAdapters,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call that may load adapters, once both ranks have the same ones.

        A refused adapter is an error of the call that adds it. A step cannot be refused or skipped, because its other
        requests are running: then the session fails.
        """
        if method == ADD_LORA:
            args = tuple(adapters.compare_request(each) for each in args)
            return args, {name: adapters.compare_request(each) for name, each in kwargs.items()}
        try:
            adapters.compare_step(args[0])
        except SparkError as error:
            session.fail(error)
            raise
        except Exception as error:
            session.fail(
                SparkError(f"the adapters of a step cannot be compared with the follower's: {described(error)}")
            )
            raise
        return args, kwargs

    def _with_compared_weights(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call that reloads weights, once both ranks have the same files; each reads its own.

        Raises:
            RefusedError: the follower has other files, or this rank none; nothing was loaded on either.
            TypeError: vLLM's worker does not take these arguments.
        """
        assert self.driver_worker is not None
        given = inspect.signature(self.driver_worker.model_runner.reload_weights).bind(*args, **kwargs).arguments
        path = given.get("weights_path")
        if given.get("weights_iterator") is not None:
            return args, kwargs  # they are in the call
        if path is None and self.vllm_config.model_config.model_weights:
            return args, kwargs  # both ranks read the same object storage
        wanted = weights_to_reload(self.vllm_config, None if path is None else str(path))
        if refusal := self._compare_files(wanted):
            raise RefusedError(f"the weights cannot be reloaded on both machines: {refusal}")
        return (), {**given, "weights_path": wanted.place}

    def _compare_files(self, wanted: LoadedFiles) -> str | None:
        """Has the follower search for the same files; returns the sentence why it does not have them, or None."""
        session = self._running_session()
        session.sender.offer([wanted])  # the follower may ask for them before it answers
        session.ask(COMPARE_FILES, (wanted,), {})
        while True:
            sent = session.sender.sent
            try:
                refusal: str | None = session.answer(_COMPARE_TIMEOUT)
            except TimeoutError:
                if session.sender.sent > sent:
                    continue  # it is being copied
                return (
                    f"the follower has not answered for {_COMPARE_TIMEOUT:g} s; see the log of vllm-spark join, and "
                    "try again"
                )
            return refusal

    def _record_facts(self, session: LeaderSession, timeout: float | None) -> None:
        """Records what the pair consists of, for its start table and status; without it the pair serves as well."""
        try:
            config, runtime = settings_of(self.vllm_config), session.runtime
            mine = self.describe(config)
            session.ask(DESCRIBE, (), {})
            theirs = from_json(session.answer(timeout), RankReport)
            packet_limit = runtime.options.packet_bytes or 0
            model = str(self.vllm_config.model_config.served_model_name)
            facts = PairFacts(model, runtime.path, packet_limit, session.endpoint, time.time(), [mine, theirs.facts])
            self._status.write_facts(facts)
            self._status.write(local_counters(LEADER_RANK, session.token_digest.state()))
            self._status.write(theirs.counters)
        except (RemoteError, TimeoutError, RecordError) as error:
            logger.warning("The follower has not described itself (%s): there is no start table.", described(error))
        except Exception as error:
            session.check()  # it failed meanwhile
            logger.warning("There is no start table: %s.", described(error), exc_info=error)

    def _uninterrupted(
        self, session: LeaderSession, method: str | Callable[..., Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Ends the session if the body, a call, is interrupted in the user's own process, which may go on."""
        if self._in_engine_process:
            return contextlib.nullcontext()  # an interrupt ends the engine process, and with it the session
        return session.uninterrupted("a step" if method in STEP_METHODS else f"the call of {_name(method)}")

    def _loaded_adapters(self) -> set[int]:
        loaded: set[int] = run_method(self.driver_worker, "list_loras", (), {})
        return loaded

    def _load_adapter(self, request: Any) -> None:
        """Loads an adapter on both ranks, once it was compared."""
        self._query(self._running_session(), ADD_LORA, None, (request,), {})

    def _step(
        self, session: LeaderSession, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], non_block: bool
    ) -> Any:
        # Before it runs here: the worker changes its arguments in place.
        self._announce_step(session, method, args, kwargs)
        with self._random_state:
            output = run_method(self.driver_worker, method, args, kwargs)
        if isinstance(output, AsyncModelRunnerOutput):
            if non_block:
                return _StepFuture(output, session, self._uninterrupted(session, method))
            output = output.get_output()
        return _record_step(session, output)

    def _announce_step(
        self, session: LeaderSession, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Sends a call of the decode loop; a sampling without grammar is sent together with its step."""
        announced, self._sampling_announced = self._sampling_announced, False
        if method == SAMPLE and announced:
            if args == (None,) and not kwargs:
                return
            raise SparkError("a step's sampling was announced without a grammar, and came with one; report this")
        if method == EXECUTE and not args[0].has_structured_output_requests:
            self._sampling_announced = True
            method = EXECUTE_THEN_SAMPLE
        session.call(method, args, kwargs)

    def _query(
        self,
        session: LeaderSession,
        method: str | Callable[..., Any],
        timeout: float | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Any]:
        if method in WEIGHT_METHODS:
            timeout = None  # whether it succeeded on both ranks decides about the session
        deadline = None if timeout is None else time.monotonic() + timeout
        session.ask(method, args, kwargs)
        try:
            with self._random_state:
                mine = run_method(self.driver_worker, method, args, kwargs)
            if isinstance(mine, AsyncModelRunnerOutput):
                mine = mine.get_output()
        except Exception as error:
            explained = session.with_steps(error)
            # Received even then: the next call would take an unread reply for its own.
            succeeded_there = session.drain_reply(explained)
            _end_with_unequal_weights(session, method, explained, on_one_rank=succeeded_there)
            raise explained from error.__cause__
        except BaseException:
            session.fail(SparkError(f"the leader was interrupted in the call of {_name(method)}; make a new engine"))
            raise
        session.own_part_done()
        try:
            return [mine, session.answer(None if deadline is None else deadline - time.monotonic())]
        except RemoteError as error:
            _end_with_unequal_weights(session, method, error, on_one_rank=True)
            raise
        except TimeoutError as error:
            raise TimeoutError(f"the call of {_name(method)} timed out after {timeout:g} s: {error}") from None

    def check_health(self) -> None:
        """Raises the reason if the session has failed."""
        self._running_session().check()

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        """`callback` is called once if the session fails, at once if it has."""
        self._running_session().on_failure(callback)

    def shutdown(self) -> None:
        """Ends the session and releases everything; may be called again, and after a failed start."""
        # vLLM calls this while an error ends its engine; a stop request is SystemExit.
        if not self._ended:
            self._ended = True
            self._status.mark_ended(clean=not isinstance(sys.exc_info()[1], Exception))
        _clear_unfinished(self)
        if self._guard is not None:
            self._guard.stop()
        tuning.stop(self.vllm_config)
        if self._session is not None:
            self._session.close("the leader is shutting down")
            if self._session.failed and self._in_engine_process:
                # Clients and the log have the reason; vLLM's engine would add a traceback.
                os._exit(EXIT_LOST)
        worker, self.driver_worker = self.driver_worker, None
        try:
            # vLLM's wrapper has no attribute `worker` if making one failed, and its `shutdown` would recurse.
            if worker is not None and not (isinstance(worker, WorkerWrapperBase) and "worker" not in vars(worker)):
                worker.shutdown()
        finally:
            if self._groups_opened:  # a later engine of this process may have opened its own since
                self._groups_opened = False
                close_groups()

    def _abandon_start(self, error: BaseException | None) -> None:
        """Cleans up after an engine that failed to start, which vLLM does not do.

        In the user's own process it releases everything and returns: the next engine, with or without a pair, needs the
        port, the follower and the names of the process groups. An engine process records the reason for the API server
        and exits at once, so that the reason does not depend on which of the two ranks failed first.

        Args:
            error: the reason; None if vLLM has reported it. An error that is not an Exception (an interrupt) ends the
                engine process by itself.
        """
        if not self._in_engine_process:
            self.shutdown()
            if not self._had_groups:
                destroy_model_parallel()
                destroy_distributed_environment()
        elif isinstance(error, Exception):
            reason = error
            if not isinstance(reason, SparkError):
                logger.error("The leader's worker failed.", exc_info=error)
                reason = SparkError(f"the leader's worker failed: {described(error)}")
            self._status.fail(reason)
            logger.error("The engine does not start: %s.", reason)
            try:
                if self._session is not None:
                    _end_process_soon(reason.exit_code)  # also if sending to the follower blocks
                    self._session.leave(f"its engine does not start: {reason}")
            finally:
                os._exit(reason.exit_code)

    def _memory_exhausted(self, error: SparkError) -> None:
        """Ends the session; an engine process exits at once, because only that gives its memory back."""
        if self._ended:  # the guard had read the memory before `shutdown` stopped it
            return
        session = self._running_session()
        session.fail(error)
        if self._in_engine_process:
            try:
                session.leave(str(error))
            finally:
                os._exit(error.exit_code)

    def _running_session(self) -> LeaderSession:
        if self._session is None:
            raise SparkError("the executor was used before it was started")
        return self._session

    def _parent_died(self) -> None:
        _end_process_soon()  # also if sending to the follower blocks
        remove_socket_folder()
        if self._session is not None and self._session.closing:
            return  # a shutdown was requested already
        logger.error("The API server has ended: the engine ends too.")
        try:
            if self._session is not None:
                self._session.leave("the leader's API server has ended")
        finally:
            os._exit(EXIT_LOST)


_unfinished: SparkExecutor | None = None
"""The executor of an engine in the user's own process that has not finished its start."""


def abandon_unfinished_start() -> None:
    """Releases the resources of an engine of this process whose start failed outside of its executor's calls.

    vLLM does not notify its executor then (the KV cache is too small for a request, say), and the engine object may
    live on in an exception's traceback. So the next engine calls this, before it needs the port and the names of the
    process groups.
    """
    executor = _unfinished
    if executor is not None:
        logger.info("The session of an engine whose start failed is closed.")
        executor._abandon_start(None)


def abandon_engine(engine: Any, error: BaseException) -> None:
    """Ends the session of an engine core of vLLM whose start failed with `error`.

    For failures after the last call of its executor, after which vLLM does not call the executor again: an error of the
    scheduler's constructor, for example.
    """
    executor = getattr(engine, "model_executor", None)
    if isinstance(executor, SparkExecutor) and not executor._ended:
        executor._abandon_start(error)


def _clear_unfinished(executor: SparkExecutor) -> None:
    """The executor has finished its start, or released everything."""
    global _unfinished
    if _unfinished is executor:
        _unfinished = None


class _StepFuture(Future[Any]):
    """The result of a step whose tokens are still being copied from the device."""

    def __init__(
        self,
        output: AsyncModelRunnerOutput,
        session: LeaderSession,
        uninterrupted: contextlib.AbstractContextManager[None],
    ) -> None:
        super().__init__()
        self._output, self._session, self._uninterrupted = output, session, uninterrupted

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the copy. `timeout` is ignored, as in vLLM's own future."""
        if not self.done():
            try:
                with self._uninterrupted, self._session.explained(step=True):
                    self.set_result(_record_step(self._session, self._output.get_output()))
            except Exception as error:
                self.set_exception(error)
        return super().result(timeout)


def _offer(vllm_config: Any) -> Offer:
    """The offer for a follower: the model's files and the environment that it must have.

    Replaces load formats that depend on a folder's files by the resolved ones.
    """
    config, files = settings_of(vllm_config), files_of(vllm_config)
    pin_load_formats(vllm_config, files)
    return Offer(
        model=str(vllm_config.model_config.model_weights or vllm_config.model_config.model),
        files=files,
        heartbeat_timeout=config.heartbeat_timeout,
        environment=recorded_environment(),
        sends_files=config.model_sync == "auto",
        memory=memory_need(vllm_config, config, sum(path.stat().st_size for path in weight_paths(files))),
    )


def _record_step(session: LeaderSession, output: Any) -> Any:
    """Adds the tokens of a step to the digest, and returns `output`."""
    if output is not None:
        session.record_step(output)
    return output


def _end_with_unequal_weights(
    session: LeaderSession, method: str | Callable[..., Any], error: Exception, *, on_one_rank: bool
) -> None:
    """Ends the session after a failed call, if the ranks' weights may be different or incomplete.

    A failed `reload_weights` leaves layers without memory in vLLM, on whatever rank.
    """
    if method == RELOAD_WEIGHTS or (on_one_rank and method in WEIGHT_METHODS):
        reason = str(error) if isinstance(error, SparkError) else f"the leader's worker failed: {described(error)}"
        session.fail(
            SparkError(
                f"the weights are incomplete or not the same on both machines after {method} ({reason}); "
                "start the server again"
            )
        )


def _name(method: str | Callable[..., Any]) -> str:
    """The name of a call in messages."""
    return method if isinstance(method, str) else getattr(method, "__qualname__", repr(method))


def _finished(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _end_process_soon(exit_code: int = EXIT_LOST) -> None:
    """Ends the process after a few seconds, also if the engine's thread hangs (in a process group of torch, say)."""

    def end() -> None:
        time.sleep(_EXIT_GRACE)
        os._exit(exit_code)

    threading.Thread(target=end, name="spark-exit", daemon=True).start()
