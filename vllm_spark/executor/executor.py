"""vLLM's executor on the leader: rank 0 in this process, rank 1 on the follower.

`SparkExecutor` is vLLM's external-launcher executor with the launcher inside: before a worker method runs here,
the call is sent to the follower, which runs it there.
"""

from __future__ import annotations

import contextlib
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
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher, UniProcExecutor
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.serial_utils import run_method

from vllm_spark.backend.ipc_folder import remove_socket_folder
from vllm_spark.backend.logging import share_vllms_log
from vllm_spark.backend.platform import activate
from vllm_spark.backend.status import CounterBoard
from vllm_spark.compat.patching import apply_all
from vllm_spark.config.attachment import settings_of
from vllm_spark.errors import EXIT_LOST, SparkError, described
from vllm_spark.executor.bootstrap import limit_numba_threads, share_cores
from vllm_spark.executor.environment import recorded_environment
from vllm_spark.executor.handshake.messages import Offer
from vllm_spark.executor.leader import Pair
from vllm_spark.executor.model_files.adapters import ADD_LORA, LeaderAdapters
from vllm_spark.executor.model_files.loaded import LoadedFiles, files_of, one_for_each_place
from vllm_spark.executor.model_files.placement import place_compared
from vllm_spark.executor.rpc import (
    COMPARE_ADAPTER,
    COMPARE_FILES,
    EXECUTE,
    EXECUTE_AND_SAMPLE,
    LAST_CALL_OF_THE_START,
    SAMPLE,
    STEP_METHODS,
)
from vllm_spark.executor.store import INIT_METHOD, close_groups, open_groups
from vllm_spark.executor.token_check import WorkerRandomState
from vllm_spark.kernels import runtime as tuning
from vllm_spark.processes.child import in_engine_process, watch_parent
from vllm_spark.processes.signals import ended_by_signals
from vllm_spark.ranks import LEADER_RANK

logger = logging.getLogger("vllm_spark")

_COMPARE_TIMEOUT = 600.0  # seconds for the follower to look for an adapter's files
_LAST_RESORT = 3.0  # seconds after a loss in which the engine may end by itself


class SparkExecutor(ExecutorWithExternalLauncher):  # type: ignore[misc]
    """Runs every worker method on both ranks; vLLM's scheduler exists here alone."""

    def _init_executor(self) -> None:
        """Finds the follower, hands it its work, and loads this rank's half of the model.

        Raises:
            SparkError: no follower came, or it does not fit; the sentence says why.
        """
        global _unfinished
        give_up_unfinished_start()
        self._owns_process = in_engine_process()
        self.driver_worker = None
        self._pair: Pair | None = None
        self._call_lock = threading.Lock()
        self._sampling_announced = False
        self._started = self._ended = self._groups_opened = False
        self._adapters: LeaderAdapters | None = None
        self._groups_of_others = torch.distributed.is_initialized()
        self._board = CounterBoard.from_environment()
        share_vllms_log()
        if self._owns_process:
            watch_parent(self._parent_died)
        else:
            _unfinished = self
        try:
            # In the user's own process signals are the user's.
            with ended_by_signals() if self._owns_process else contextlib.nullcontext():
                self._start()
        except BaseException as error:
            self._give_up_start(error)
            raise

    def _start(self) -> None:
        activate()
        offer = _offer(self.vllm_config)
        self._pair = Pair.form(settings_of(self.vllm_config), offer, self.vllm_config, self._board)
        if self._owns_process:
            self._pair.on_failure(_end_process_soon)
        share_cores(self._pair.runtime)
        if self._owns_process:
            limit_numba_threads()
        self._random_state = WorkerRandomState()
        open_groups(self._pair.groups, LEADER_RANK)
        self._groups_opened = True
        with self._pair.explained(), self._random_state:
            apply_all("serving")
            tuning.start(self.vllm_config)
            UniProcExecutor._init_executor(self)
            tuning.tell_of_experts(self.driver_worker)
        if self.vllm_config.lora_config is not None:
            self._adapters = LeaderAdapters(self._compare_files, self._loaded_adapters)

    def _distributed_args(self) -> tuple[str, int, int]:
        return INIT_METHOD, LEADER_RANK, 0

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

        The calls of the decode loop return this rank's result alone; any other returns both ranks', in rank order.

        Raises:
            SparkError: the follower is lost, or its worker failed.
            TimeoutError: the follower did not answer within `timeout` seconds; the pair works on.
        """
        pair = self._working_pair()
        try:
            result = self._run(pair, method, timeout, args, kwargs or {}, non_block, single_value)
        except BaseException as error:
            if not self._started:
                self._give_up_start(error)
            raise
        if method == LAST_CALL_OF_THE_START:
            self._started = True
            _finish(self)
        return result

    def _run(
        self,
        pair: Pair,
        method: str | Callable[..., Any],
        timeout: float | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        non_block: bool,
        single_value: bool,
    ) -> Any:
        with self._call_lock, self._whole(pair, method), pair.explained():
            if self._adapters is not None and method in (ADD_LORA, EXECUTE):
                args, kwargs = self._with_own_adapters(pair, self._adapters, str(method), args, kwargs)
            if method == COMPARE_ADAPTER:
                if self._adapters is not None:
                    self._adapters.compare(*args)
                result: Any = None if single_value else [None]
            elif method in STEP_METHODS:
                output = self._step(pair, str(method), args, kwargs, non_block)
                if isinstance(output, Future):
                    return output if single_value else _finished([output.result()])
                result = output if single_value else [output]
            else:
                results = self._query(pair, method, timeout, args, kwargs)
                result = results[LEADER_RANK] if single_value else results
        return _finished(result) if non_block else result

    def _with_own_adapters(
        self, pair: Pair, adapters: LeaderAdapters, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call that may load adapters, once both ranks have the same ones.

        A refused adapter is an error of the call that adds it. A step cannot be refused, or be left out for another
        error: its other requests are under way.
        """
        if method == ADD_LORA:
            args = tuple(adapters.settle(each) for each in args)
            return args, {name: adapters.settle(each) for name, each in kwargs.items()}
        try:
            adapters.settle_step(args[0])
        except SparkError as error:
            pair.fail(error)
            raise
        except Exception as error:
            pair.fail(SparkError(f"the adapters of a step cannot be compared with the follower's: {described(error)}"))
            raise
        return args, kwargs

    def _compare_files(self, wanted: LoadedFiles) -> str | None:
        """Has the follower look for the same files; the sentence why it does not have them, or None."""
        pair = self._working_pair()
        pair.ask(COMPARE_FILES, (wanted,), {})
        try:
            refusal: str | None = pair.answer(_COMPARE_TIMEOUT)
        except TimeoutError:
            return (
                f"the follower has not answered for {_COMPARE_TIMEOUT:g} s; see the log of vllm-spark join, and load "
                "the adapter again"
            )
        return refusal

    def _whole(self, pair: Pair, method: str | Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
        """Ends the pair if the body, a call, is interrupted in the user's own process, which may go on."""
        if self._owns_process:
            return contextlib.nullcontext()  # the engine ends, in order if it was asked to
        return pair.uninterrupted("a step" if method in STEP_METHODS else f"the call of {_name(method)}")

    def _loaded_adapters(self) -> set[int]:
        loaded: set[int] = run_method(self.driver_worker, "list_loras", (), {})
        return loaded

    def _step(self, pair: Pair, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], non_block: bool) -> Any:
        # Before it runs here: the worker changes its arguments in place.
        self._announce_step(pair, method, args, kwargs)
        with self._random_state:
            output = run_method(self.driver_worker, method, args, kwargs)
        if isinstance(output, AsyncModelRunnerOutput):
            if non_block:
                return _StepFuture(output, pair, self._whole(pair, method))
            output = output.get_output()
        return _noted(pair, output)

    def _announce_step(self, pair: Pair, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tells the follower what comes, and of a sampling that is sure to come already with its step."""
        announced, self._sampling_announced = self._sampling_announced, False
        if method == SAMPLE and announced:
            if args == (None,) and not kwargs:
                return
            raise SparkError("a step's sampling was announced without a grammar, and came with one; report this")
        if method == EXECUTE and not args[0].has_structured_output_requests:
            self._sampling_announced = True
            method = EXECUTE_AND_SAMPLE
        pair.call(method, args, kwargs)

    def _query(
        self,
        pair: Pair,
        method: str | Callable[..., Any],
        timeout: float | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Any]:
        deadline = None if timeout is None else time.monotonic() + timeout
        pair.ask(method, args, kwargs)
        try:
            with self._random_state:
                mine = run_method(self.driver_worker, method, args, kwargs)
            if isinstance(mine, AsyncModelRunnerOutput):
                mine = mine.get_output()
        except Exception as error:
            # Also then: an unread answer would be taken for the next call's.
            pair.settle(error)
            raise
        except BaseException:
            pair.fail(SparkError(f"the leader was interrupted in the call of {_name(method)}; make a new engine"))
            raise
        try:
            return [mine, pair.answer(None if deadline is None else deadline - time.monotonic())]
        except TimeoutError as error:
            raise TimeoutError(f"the call of {_name(method)} timed out after {timeout:g} s: {error}") from None

    def check_health(self) -> None:
        """Raises the reason if the pair is broken."""
        self._working_pair().check()

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        """`callback` is called once if the pair breaks, at once if it has."""
        self._working_pair().on_failure(callback)

    def determine_available_memory(self) -> list[int]:
        """Free memory of both ranks in bytes, in rank order; vLLM takes the smaller."""
        return list(self.collective_rpc("determine_available_memory"))

    def shutdown(self) -> None:
        """Tells the follower, and releases everything; may be called again, and after a failed start."""
        # vLLM calls this while the error ends its engine; a stop is SystemExit there.
        if not self._ended:
            self._ended = True
            self._board.end_work(in_order=not isinstance(sys.exc_info()[1], Exception))
        _finish(self)
        tuning.stop(self.vllm_config)
        if self._pair is not None:
            self._pair.close("the leader is shutting down")
            if self._pair.failed and self._owns_process:
                # All was said, to clients and in the log; vLLM's engine would end in a traceback.
                os._exit(EXIT_LOST)
        worker, self.driver_worker = self.driver_worker, None
        if worker is not None:
            worker.shutdown()
        if self._groups_opened:  # a later engine of this process may have opened its own since
            self._groups_opened = False
            close_groups()

    def _give_up_start(self, error: BaseException | None) -> None:
        """Does what vLLM does not do for an engine that does not start; returns in the user's own process.

        There everything is released: the next engine, paired or not, needs the port, the follower and the names of the
        process groups. An engine in a process of its own has all that end with it: it leaves a sentence that says why
        for the API server, and ends at once. Both ranks often fail alike, and which one is first is chance: so that
        there is a sentence, and one traceback of whoever failed, does not depend on it.

        Args:
            error: why; None if vLLM knows. What is no Exception, as an interrupt, ends the engine by itself.
        """
        if not self._owns_process:
            self.shutdown()
            if not self._groups_of_others:
                destroy_model_parallel()
                destroy_distributed_environment()
        elif isinstance(error, Exception):
            reason = error
            if not isinstance(reason, SparkError):
                logger.error("The leader's worker failed.", exc_info=error)
                reason = SparkError(f"the leader's worker failed: {described(error)}")
            self._board.fail(reason)
            logger.error("The engine does not start: %s.", reason)
            try:
                if self._pair is not None:
                    _end_process_soon(reason.exit_code)  # whatever the follower's end may meet
                    self._pair.leave(f"its engine does not start: {reason}")
            finally:
                os._exit(reason.exit_code)

    def _working_pair(self) -> Pair:
        if self._pair is None:
            raise SparkError("the executor was used before it was started")
        return self._pair

    def _parent_died(self) -> None:
        _end_process_soon()  # whatever saying goodbye may meet
        remove_socket_folder()
        if self._pair is not None and self._pair.closing:
            return  # it asked for the end, and did not wait for it
        logger.error("The API server is gone: the engine ends.")
        try:
            if self._pair is not None:
                self._pair.leave("the leader's API server is gone")
        finally:
            os._exit(EXIT_LOST)


_unfinished: SparkExecutor | None = None
"""The executor of an engine in the user's own process that has not come up yet."""


def give_up_unfinished_start() -> None:
    """Releases what an engine of this process holds that failed while it came up, outside of its executor's calls.

    vLLM tells its executor nothing then (the KV cache is too small for a request, say), and a half-made engine has no
    end that could be waited for: an exception's traceback may hold it. So the next engine calls this, before it needs
    the port and the names of the process groups.
    """
    executor = _unfinished
    if executor is not None:
        logger.info("An engine that did not come up is given up: its pair ends.")
        executor._give_up_start(None)


def give_up_engine(engine: Any, error: BaseException) -> None:
    """Ends the pair of an engine core of vLLM whose start has failed with `error`.

    After the executor's last call of the start, for which nobody calls it again: its scheduler cannot be made, say.
    """
    executor = getattr(engine, "model_executor", None)
    if isinstance(executor, SparkExecutor) and not executor._ended:
        executor._give_up_start(error)


def _finish(executor: SparkExecutor) -> None:
    """It is up, or has released everything."""
    global _unfinished
    if _unfinished is executor:
        _unfinished = None


class _StepFuture(Future[Any]):
    """The result of a step whose tokens are still being copied from the device."""

    def __init__(
        self, output: AsyncModelRunnerOutput, pair: Pair, whole: contextlib.AbstractContextManager[None]
    ) -> None:
        super().__init__()
        self._output, self._pair, self._whole = output, pair, whole

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the copy. A time-out is not supported: vLLM's own future has none either."""
        if not self.done():
            try:
                with self._whole, self._pair.explained():
                    self.set_result(_noted(self._pair, self._output.get_output()))
            except Exception as error:
                self.set_exception(error)
        return super().result(timeout)


def _offer(vllm_config: Any) -> Offer:
    """What this leader serves, as a follower must have it. Puts the places of the compared files into `vllm_config`.

    Raises:
        RefusedError: something that is to be loaded is not there, or cannot be read.
    """
    model = str(vllm_config.model_config.model_weights or vllm_config.model_config.model)
    files = files_of(vllm_config)
    place_compared(vllm_config, files)
    return Offer(
        model=model,
        files=one_for_each_place(files),
        heartbeat_timeout=settings_of(vllm_config).heartbeat_timeout,
        environment=recorded_environment(),
    )


def _noted(pair: Pair, output: Any) -> Any:
    """Puts what a step sampled into the ledger, on its way to the scheduler."""
    if output is not None:
        pair.record(output)
    return output


def _name(method: str | Callable[..., Any]) -> str:
    """How to name a call in messages."""
    return method if isinstance(method, str) else getattr(method, "__qualname__", repr(method))


def _finished(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _end_process_soon(exit_code: int = EXIT_LOST) -> None:
    """Whatever the engine's thread is stuck in (a process group of torch, say), the process ends."""

    def end() -> None:
        time.sleep(_LAST_RESORT)
        os._exit(exit_code)

    threading.Thread(target=end, name="spark-last-resort", daemon=True).start()
