"""The follower's half: waits for a leader, loads the other half of its model, runs what the leader runs.

One process per leader. Whatever a session leaves behind (device memory, process groups, threads stuck in a
collective) ends with its process; `vllm-spark join` starts the next one.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from vllm_spark.backend.support import refuse_fp8_inputs_of_marlin
from vllm_spark.collective import Runtime
from vllm_spark.compat.patching import apply_all
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import EXIT_LOST, EXIT_REFUSED, EXIT_USAGE, PeerLeftError, PeerLostError, SparkError, described
from vllm_spark.executor.bootstrap import (
    Assignment,
    connect_runtime,
    limit_numba_threads,
    link_patience,
    local_address_towards,
    share_cores,
    use_link_interface,
)
from vllm_spark.executor.channel.addresses import leader_endpoint
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.framing import MIB, Kind, Lane
from vllm_spark.executor.channel.secret import load_secret
from vllm_spark.executor.counters import local_counters
from vllm_spark.executor.environment import Environment, SessionEnvironment, adopt
from vllm_spark.executor.group_connection import GroupLink
from vllm_spark.executor.handshake.client import Caller
from vllm_spark.executor.handshake.leader_search import AnswerDoctor, LeaderSearch
from vllm_spark.executor.handshake.messages import CALLS, GROUPS, Reason
from vllm_spark.executor.heartbeat import Pulse, cause_grace
from vllm_spark.executor.model_files.adapters import ADD_LORA, FollowerAdapters
from vllm_spark.executor.model_files.loaded import FileKey
from vllm_spark.executor.model_files.placement import place_files
from vllm_spark.executor.pickling import loads_configuration
from vllm_spark.executor.rpc import (
    COMPARE_FILES,
    EXECUTE,
    EXECUTE_AND_SAMPLE,
    LAST_CALL_OF_THE_START,
    SAMPLE,
    Call,
    decode_call,
    decode_header,
    encode_error,
    encode_result,
)
from vllm_spark.executor.token_check import TokenLedger
from vllm_spark.kernels import runtime as tuning
from vllm_spark.ranks import FOLLOWER_RANK

logger = logging.getLogger("vllm_spark")

_ASSIGNMENT_TIMEOUT = 120.0
_END_GRACE = 5.0  # seconds in which the thread that ends this process does so
_AWAKE = 0.002  # seconds after a call in which the next one finds this rank awake: a scheduler's pause between steps


class FollowerSession:
    """One leader's follower, from the first connection to the last call.

    Args:
        config: the follower's settings.
        answer_doctor: what to do when a doctor comes in a leader's place; gets the control lane, the CHECK_REQUEST, the
            settings, and the address of the doctor's machine. Raises PeerLostError if the doctor leaves early.
        once: end when the first leader does, or when it refuses; the exit code is then that of the reason.
        adopted: the leader's environment with which this process was started; None without.
    """

    def __init__(
        self,
        config: SparkConfig,
        answer_doctor: AnswerDoctor,
        *,
        once: bool = False,
        adopted: Environment | None = None,
    ) -> None:
        self._config, self._answer_doctor, self._once = config, answer_doctor, once
        self._environment = SessionEnvironment(adopted)  # before vLLM is imported, which changes it
        self._own: dict[FileKey, Path] = {}  # where this machine has the leader's files
        self._adapters = FollowerAdapters(self._loaded_adapters)
        self._ledger = TokenLedger()
        self._ended = threading.Event()
        self._ender: threading.Thread | None = None  # who set it
        self._running_model = False
        self._pulse: Pulse | None = None
        self._failed_call = ""  # why the last call that is answered failed
        self._failed_number = 0  # and which it was
        self._worker: Any = None
        self._serves_adapters = False
        self._runtime: Runtime | None = None
        self._leader_config = config  # until it comes
        self._outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self) -> None:
        """Waits for a leader and follows it until it leaves. Returns only by an exception or by ending the process.

        Raises:
            SparkError: the sides do not fit, or the work failed; the leader was told, where it could be.
            RestartError: the leader has another environment, with which another process must start.
        """
        host, port = leader_endpoint(self._config)
        context = tls_context(load_secret(self._config, host), "follower")

        def connect() -> Caller:
            return Caller(host, port, context, self._config.max_frame_mib * MIB)

        search = LeaderSearch(self._config, connect, self._answer_doctor, self._environment.check, once=self._once)
        search.announce()
        _load_vllm()
        caller, control, offer, self._own = search.find()
        calls, groups = caller.connect(CALLS), caller.connect(GROUPS)
        if calls is None or groups is None:
            raise PeerLostError(f"the leader at {caller.endpoint} stopped listening")
        self._pulse = Pulse(
            control,
            offer.heartbeat_timeout,
            report=self._report,
            on_report=self._compare,
            on_end=self._leader_ended,
            on_link=self._take_announcement,
            patience=self._patience,
        )
        self._pulse.start()
        for lane in (control, calls, groups):
            lane.rely_on_beats()
        try:
            self._follow(calls, GroupLink(groups, self._give_up), host, port)
        except Exception as error:
            self._give_up(error)

    def _follow(self, calls: Lane, groups: GroupLink, host: str, port: int) -> None:
        assignment: Assignment = loads_configuration(calls.expect(Kind.ASSIGNMENT, timeout=_ASSIGNMENT_TIMEOUT).payload)
        adopt(assignment.environment)
        use_link_interface(host, local_address_towards(host, port))
        from vllm_spark.backend.platform import activate, compute_capability

        activate()
        refuse_fp8_inputs_of_marlin(compute_capability)
        assert self._pulse is not None
        self._leader_config = assignment.config
        self._runtime = connect_runtime(
            FOLLOWER_RANK, assignment.config, assignment.launch, calls, self._pulse.announce, self._config.rails
        )
        share_cores(self._runtime)
        limit_numba_threads()
        apply_all("serving")
        tuning.start(assignment.vllm_config)
        place_files(assignment.vllm_config, self._own)
        self._worker = _load_worker(assignment.vllm_config, groups)
        self._serves_adapters = assignment.vllm_config.lora_config is not None
        tuning.log_expert_backends(self._worker)
        threading.Thread(target=self._read_outputs, name="spark-outputs", daemon=True).start()
        logger.info("This rank's half of the model is loaded.")
        while True:
            frame = calls.expect(Kind.CALL, Kind.QUERY, awake=_AWAKE)
            self._run_call(frame.payload, calls if frame.kind is Kind.QUERY else None)

    def _run_call(self, payload: bytes, reply_to: Lane | None) -> None:
        from vllm.v1.serial_utils import run_method

        header = decode_header(payload)
        self._ledger.compare(header.step, header.digest)
        if reply_to is None:
            self._run_step(decode_call(payload))
            return
        self._failed_call, self._failed_number = "", 0
        method: str | Callable[..., Any] = "a call that cannot be loaded here"
        try:
            call = decode_call(payload)
            method = call.method
            if method == COMPARE_FILES:
                result: Any = self._adapters.compare(*call.args)
            else:
                result = run_method(self._worker, call.method, *self._with_own_adapters(call))
            if hasattr(result, "get_output"):
                result = result.get_output()
            answer = encode_result(result, header.number)
            if method == LAST_CALL_OF_THE_START:
                logger.info("Ready: from now on this machine takes part in every step of its leader.")
        except Exception as error:
            # The leader decides what a failed control call means; its own rank may have failed alike. It may also be
            # in a collective that this rank does not come to: the control lane tells it then.
            logger.exception("The worker failed in %s.", method)
            answer = encode_error(error, header.number)
            self._failed_call = f"its worker failed in {method!r}: {described(error)}"
            self._failed_number = header.number
        reply_to.send(Kind.REPLY, answer)

    def _with_own_adapters(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call; of one that adds an adapter, with this machine's folder."""
        if call.method != ADD_LORA or not self._serves_adapters:
            return call.args, call.kwargs
        place = self._adapters.place
        return tuple(place(each) for each in call.args), {name: place(each) for name, each in call.kwargs.items()}

    def _loaded_adapters(self) -> set[int]:
        loaded: set[int] = self._worker.list_loras()
        return loaded

    def _run_step(self, call: Call) -> None:
        from vllm.v1.serial_utils import run_method

        if not self._running_model and self._pulse is not None:
            self._running_model = True
            self._pulse.model_runs()
        method = EXECUTE if call.method == EXECUTE_AND_SAMPLE else call.method
        if method == EXECUTE and self._serves_adapters:
            self._adapters.place_step(call.args[0])
        output = run_method(self._worker, method, call.args, call.kwargs)
        if output is None and call.method == EXECUTE_AND_SAMPLE:
            output = run_method(self._worker, SAMPLE, (None,), {})
        self._outputs.put(output)

    def _read_outputs(self) -> None:
        """Notes what each step sampled, off the thread that runs the model: it may still be on the device."""
        try:
            while True:
                output = self._outputs.get()
                if hasattr(output, "get_output"):
                    output = output.get_output()
                if output is not None:
                    assert self._runtime is not None
                    self._runtime.check()  # kernels that give up cannot raise; their tokens are worth nothing
                    self._ledger.record(output)
        except Exception as error:
            self._give_up(error)

    def _take_announcement(self, announcement: bytes) -> None:
        if self._runtime is not None:
            self._runtime.deliver(announcement)

    def _patience(self) -> float:
        return link_patience(self._runtime, self._leader_config)

    def _report(self) -> dict[str, Any]:
        counters = local_counters(FOLLOWER_RANK, self._ledger.state())
        return {
            "counters": msgspec.to_builtins(counters),
            "failed_call": self._failed_call,
            "failed_number": self._failed_number,
        }

    def _compare(self, theirs: Any) -> None:
        self._ledger.compare(theirs["step"], bytes.fromhex(theirs["digest"]))

    def _leader_ended(self, error: SparkError) -> None:
        """The common work is over: this process with it, whatever its other threads are stuck in."""
        self._end_here()
        if isinstance(error, PeerLeftError):
            logger.info("The session ends: %s.", error)
            _exit(0)
        elif isinstance(error, PeerLostError):
            logger.error("The leader is lost: %s.", error)
            _exit(EXIT_LOST)
        else:
            self._give_up(error)

    def stop(self, number: signal.Signals) -> NoReturn:
        """Says goodbye to the leader, if there is one, and ends the process. Called from a thread of its own."""
        self._end_here()
        if self._pulse is not None:
            self._pulse.stop(Reason("it was stopped there"))
        _exit(128 + number)

    def _end_here(self) -> None:
        """From now on the calling thread ends this process, and knows why."""
        self._ender = threading.current_thread()
        self._ended.set()

    def _give_up(self, error: BaseException) -> None:
        """Tells the leader why, and ends the process."""
        if self._ender is not threading.current_thread() and self._ended.wait(cause_grace(error)):
            # What surfaced is a symptom of the end that another thread reports.
            time.sleep(_END_GRACE)
        if isinstance(error, SparkError):
            logger.error("The follower ends: %s.", error)
            details = ""
        else:
            logger.error("The follower's worker failed.", exc_info=error)
            import traceback

            details = "".join(traceback.format_exception(error))
        sentence = str(error) if isinstance(error, SparkError) else described(error)
        if self._pulse is not None:
            self._pulse.say(Kind.FAILURE, Reason(sentence, details))
            self._pulse.stop(timeout=2.0)
        code = getattr(error, "exit_code", 1)
        # What was wrong with one leader's work need not be wrong with the next one's.
        _exit(1 if code in (EXIT_USAGE, EXIT_REFUSED) and not self._once else code)


def _load_vllm() -> None:
    """Imports vLLM before connecting: it takes seconds, in which a connected follower could not beat."""
    from vllm_spark.compat.check import check_vllm

    check_vllm()
    importlib.import_module("vllm.v1.worker.worker_base")


def _load_worker(vllm_config: Any, groups: GroupLink) -> Any:
    """vLLM's worker for rank 1, with its half of the model loaded."""
    from vllm.platforms import current_platform
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from vllm_spark.executor.store import INIT_METHOD, open_groups

    open_groups(groups, FOLLOWER_RANK)
    # The only worker of this machine (rpc_rank 0), and rank 1 of the pair.
    worker = WorkerWrapperBase(rpc_rank=0, global_rank=FOLLOWER_RANK)
    worker.init_worker(
        [
            {
                "vllm_config": vllm_config,
                "local_rank": 0,
                "rank": FOLLOWER_RANK,
                "distributed_init_method": INIT_METHOD,
                "is_driver_worker": False,
                "shared_worker_lock": None,
            }
        ]
    )
    worker.init_device()
    worker.load_model()
    current_platform.update_block_size_for_backend(vllm_config)
    return worker


def _exit(code: int) -> NoReturn:
    """Ends the process at once: other threads may be stuck in a collective or in a process group."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
