"""The follower's side of a session: waits for a leader, loads its half of the model, and runs the leader's calls.

One process per session, started by `vllm-spark join`. Device memory, process groups and threads that hang in a
collective end with the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from vllm_spark.backend.pair_status.readings import Sensors
from vllm_spark.backend.pair_status.report import RankReport
from vllm_spark.backend.start_step import step_of, with_steps
from vllm_spark.backend.support import check_marlin_inputs
from vllm_spark.collective import Runtime
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import (
    EXIT_LOST,
    EXIT_REFUSED,
    EXIT_USAGE,
    PeerLeftError,
    PeerLostError,
    RefusedError,
    SparkError,
    described,
)
from vllm_spark.executor.bootstrap import (
    Assignment,
    connect_runtime,
    link_tolerance,
    use_link_interface,
)
from vllm_spark.executor.channel.addresses import host_name, leader_endpoint, source_address
from vllm_spark.executor.channel.framing import Connection, Kind
from vllm_spark.executor.counters import local_counters
from vllm_spark.executor.environment import Environment, SessionEnvironment, adopt
from vllm_spark.executor.group_connection import GroupConnection
from vllm_spark.executor.handshake.client import Connector, make_connector
from vllm_spark.executor.handshake.leader_search import AnswerDoctor, LeaderSearch
from vllm_spark.executor.handshake.messages import GROUPS, RPC, Offer, Reason
from vllm_spark.executor.heartbeat import FollowerReport, Heartbeat, LeaderReport, cause_grace
from vllm_spark.executor.model_files.adapters import ADD_LORA, FollowerAdapters
from vllm_spark.executor.model_files.compared import ComparedFiles
from vllm_spark.executor.model_files.loaded import FileKey, LoadedFiles, weight_paths
from vllm_spark.executor.model_files.own import find_own
from vllm_spark.executor.model_files.placement import place_files
from vllm_spark.executor.model_sync.fetch_from_leader import fetch_from_leader, may_be_copied
from vllm_spark.executor.model_sync.progress import CopyDisplay
from vllm_spark.executor.pickling import loads_configuration
from vllm_spark.executor.rpc import (
    COMPARE_FILES,
    DESCRIBE,
    EXECUTE,
    EXECUTE_THEN_SAMPLE,
    RELOAD_WEIGHTS,
    SAMPLE,
    SILENT_METHODS,
    SILENT_SECONDS,
    TRACE_METHODS,
    WARM_UP,
    Call,
    decode_call,
    decode_header,
    encode_error,
    encode_result,
)
from vllm_spark.executor.token_check import TokenDigest
from vllm_spark.executor.tracing.follower import FollowerTrace
from vllm_spark.memory.guard import MemoryGuard, raise_oom_score
from vllm_spark.ranks import FOLLOWER_RANK
from vllm_spark.records import to_json

logger = logging.getLogger("vllm_spark")

_ASSIGNMENT_TIMEOUT = 120.0
_EXIT_GRACE = 5.0  # seconds in which the ending thread exits the process
_SPIN_SECONDS = 0.002  # seconds of polling for the next call before sleeping: a scheduler's pause between steps


class FollowerSession:
    """The session with one leader, from the first connection to the last call.

    Args:
        config: the follower's settings.
        answer_doctor: called when `vllm-spark doctor` listens in a leader's place, with the control connection, the
            CHECK_REQUEST, the settings, and the address of that machine. Raises PeerLostError if it disconnects.
        once: end with the first session, or at the first refusal; the exit code is then that of the reason.
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
        self._own_files: dict[FileKey, Path] = {}  # where the leader's files are on this machine
        self._weight_files: list[Path] = []
        self._compared = ComparedFiles(self._find_files)
        self._adapters = FollowerAdapters(self._loaded_adapters, self._compared)
        self._connector: Connector | None = None
        self._leader_sends_files = False
        self._token_digest = TokenDigest()
        self._ended = threading.Event()
        self._ending_thread: threading.Thread | None = None  # the thread that set `_ended`
        self._running_model = False
        self._heartbeat: Heartbeat | None = None
        self._failed_call = ""  # why the last QUERY failed
        self._failed_number = 0  # and its number
        self._call_tolerance = 0.0  # from one of SILENT_METHODS to the next call: the leader may take longer
        self._answered = 0  # the number of the last QUERY that is finished
        self._caller: int | None = None  # the thread that runs calls
        self._leader_step = ""  # the step of vLLM's start in which the leader is
        self._executor: Any = None
        self._worker: Any = None
        self._serves_adapters = False
        self._runtime: Runtime | None = None
        self._trace: FollowerTrace | None = None
        self._leader_config = config  # until the ASSIGNMENT
        self._sensors = Sensors()
        self._outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self) -> None:
        """Waits for a leader and runs its calls until the session ends, and then ends the process.

        Raises:
            SparkError: the sides do not fit, or the session failed; the leader got the reason if it was connected.
            RestartError: the leader has another environment; another process must start with it.
        """
        host, port = leader_endpoint(self._config)
        connect = partial(make_connector, self._config, host, port)
        search = LeaderSearch(self._config, connect, self._answer_doctor, self._check_offer, once=self._once)
        search.announce()
        _load_vllm()
        connector, control, offer, self._own_files = search.find()
        self._connector, self._leader_sends_files = connector, offer.sends_files
        self._weight_files = weight_paths(offer.files, self._own_files)
        rpc, groups = connector.connect(RPC), connector.connect(GROUPS)
        if rpc is None or groups is None:
            raise PeerLostError(f"the leader at {connector.endpoint} stopped listening")
        self._heartbeat = Heartbeat(
            control,
            offer.heartbeat_timeout,
            report=self._report,
            peer_report=LeaderReport,
            on_report=self._compare_digest,
            on_end=self._session_ended,
            on_link=self._deliver_announcement,
            tolerance=self._tolerance,
        )
        self._heartbeat.start()
        self._sensors.start()
        for connection in (control, rpc, groups):
            connection.disable_keepalive()
        try:
            self._follow(rpc, GroupConnection(groups, self._fail), host)
        except Exception as error:
            self._fail(error)

    def _follow(self, rpc: Connection, groups: GroupConnection, host: str) -> None:
        assignment: Assignment = loads_configuration(rpc.expect(Kind.ASSIGNMENT, timeout=_ASSIGNMENT_TIMEOUT).payload)
        adopt(assignment.environment)
        use_link_interface(source_address(host))
        from vllm_spark.backend.memory_need import reserved_bytes
        from vllm_spark.backend.platform import activate, compute_capability
        from vllm_spark.executor.rank_executor import FollowerExecutor

        self._caller = threading.get_ident()
        activate()
        check_marlin_inputs(compute_capability)
        raise_oom_score()
        MemoryGuard(reserved_bytes(self._config), host_name(), self._memory_exhausted).start()
        assert self._heartbeat is not None
        self._leader_config = assignment.config
        self._runtime = connect_runtime(
            FOLLOWER_RANK,
            assignment.config,
            assignment.launch,
            rpc,
            self._heartbeat.announce,
            self._config.rails,
            assignment.wire,
        )
        place_files(assignment.vllm_config, self._own_files)
        self._executor = FollowerExecutor(assignment.vllm_config, groups, self._runtime, self._weight_files)
        self._worker = self._executor.driver_worker
        self._serves_adapters = assignment.vllm_config.lora_config is not None
        self._trace = FollowerTrace(self, self._runtime, self._worker)
        threading.Thread(target=self._read_outputs, name="spark-outputs", daemon=True).start()
        logger.info("This rank's half of the model is loaded.")
        while True:
            frame = rpc.expect(Kind.CALL, Kind.QUERY, spin=_SPIN_SECONDS)
            self._run_call(frame.payload, rpc if frame.kind is Kind.QUERY else None)

    def _check_offer(self, offer: Offer) -> None:
        from vllm_spark.backend.memory_need import check_fits

        self._environment.check(offer.environment)
        check_fits(offer.memory, self._config, host_name())

    def _memory_exhausted(self, error: SparkError) -> None:
        self._claim_end()  # at once: an error of another thread is a symptom of it
        self._fail(error)

    def _run_call(self, payload: bytes, reply_to: Connection | None) -> None:
        from vllm.v1.serial_utils import run_method

        header = decode_header(payload)
        self._token_digest.compare(header.step, header.digest)
        self._call_tolerance = 0.0
        if reply_to is None:
            self._run_step(decode_call(payload))
            return
        self._failed_call, self._failed_number = "", 0
        method: str | Callable[..., Any] = "a call that cannot be loaded here"
        try:
            call = decode_call(payload)
            method = call.method
            self._call_tolerance = SILENT_SECONDS if method in SILENT_METHODS else 0.0
            if method == COMPARE_FILES:
                result: Any = self._compared.compare(*call.args)
            elif method == DESCRIBE:
                result = self._described()
            elif method in TRACE_METHODS:
                assert self._trace is not None
                result = self._trace.answer(call, reply_to)
            else:
                result = run_method(self._worker, call.method, *self._with_own_files(call))
            if hasattr(result, "get_output"):
                result = result.get_output()
            answer = encode_result(result, header.number)
            if method == WARM_UP:
                logger.info("Ready: this machine runs every step together with its leader.")
        except Exception as error:
            # The leader decides what to do about a failed call; it may have failed there too. If the leader waits in a
            # collective that this rank does not call, the heartbeat reports the failure.
            logger.exception("The worker failed in %s.", method)
            error = with_steps(error, "rank 1", "rank 0", self._leader_step)
            answer = encode_error(error, header.number)
            self._failed_call = f"its worker failed in {method!r}: {described(error)}"
            self._failed_number = header.number
        self._answered = header.number
        reply_to.send(Kind.REPLY, answer)

    def _described(self) -> bytes:
        facts = self._executor.describe(self._config)
        return to_json(RankReport(facts, local_counters(FOLLOWER_RANK, self._token_digest.state())))

    def _with_own_files(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call; if it loads an adapter or weights, with the path of this machine's folder."""
        if call.method == ADD_LORA and self._serves_adapters:
            place = self._adapters.place
            return tuple(place(each) for each in call.args), {name: place(each) for name, each in call.kwargs.items()}
        leaders = call.kwargs.get("weights_path")
        if call.method == RELOAD_WEIGHTS and leaders is not None:
            own = self._compared.place(leaders, "model")
            self._compared.verify(leaders)
            return call.args, {**call.kwargs, "weights_path": str(own)}
        return call.args, call.kwargs

    def _loaded_adapters(self) -> set[int]:
        loaded: set[int] = self._worker.list_loras()
        return loaded

    def _find_files(self, wanted: LoadedFiles) -> Path:
        """Where this machine has an adapter or weights of the leader's, which are copied if they are not here.

        Raises:
            SparkError: they are not here and cannot be copied.
        """
        copies = self._leader_sends_files and may_be_copied(wanted)
        try:
            return find_own(wanted, mapping=self._config.mapped_folders, download=not copies)
        except RefusedError:
            if not copies or self._connector is None:
                raise
        with CopyDisplay("Copying from the leader") as display:
            return fetch_from_leader(wanted, self._connector, self._config, display.show)

    def _run_step(self, call: Call) -> None:
        from vllm.v1.serial_utils import run_method

        if not self._running_model and self._heartbeat is not None:
            self._running_model = True
            self._heartbeat.model_started()
        method = EXECUTE if call.method == EXECUTE_THEN_SAMPLE else call.method
        if method == EXECUTE:
            assert self._runtime is not None
            self._runtime.wake_proxy()
            if self._serves_adapters:
                self._adapters.place_step(call.args[0])
        output = run_method(self._worker, method, call.args, call.kwargs)
        if output is None and call.method == EXECUTE_THEN_SAMPLE:
            output = run_method(self._worker, SAMPLE, (None,), {})
        if hasattr(output, "draft_token_ids"):
            # vLLM's own list of the batch's requests, which the next step changes.
            output = dataclasses.replace(output, req_ids=list(output.req_ids))
        self._outputs.put(output)

    def _read_outputs(self) -> None:
        """Adds the tokens of each step to the digest, in a thread of its own: they may still be on the device."""
        try:
            while True:
                output = self._outputs.get()
                if hasattr(output, "get_output"):
                    output = output.get_output()
                if output is not None:
                    assert self._runtime is not None
                    self._runtime.check()  # failed kernels cannot raise; their tokens are invalid
                    self._token_digest.update(output)
        except Exception as error:
            self._fail(error)

    def _deliver_announcement(self, announcement: bytes) -> None:
        if self._runtime is not None:
            self._runtime.deliver(announcement)

    def _tolerance(self) -> float:
        return max(self._call_tolerance, link_tolerance(self._runtime, self._leader_config))

    def _report(self) -> FollowerReport:
        counters = local_counters(FOLLOWER_RANK, self._token_digest.state())
        step = "" if self._running_model else step_of(self._caller)
        return FollowerReport(
            counters, self._failed_call, self._failed_number, self._answered, step, self._sensors.readings
        )

    def _compare_digest(self, theirs: LeaderReport) -> None:
        self._leader_step = theirs.start_step
        self._token_digest.compare(theirs.step, bytes.fromhex(theirs.digest))

    def _session_ended(self, error: SparkError) -> None:
        """Ends this process, also if its other threads hang."""
        self._claim_end()
        if isinstance(error, PeerLeftError):
            logger.info("The session ends: %s.", error)
            _exit(0)
        elif isinstance(error, PeerLostError):
            logger.error("The leader is lost: %s.", error)
            _exit(EXIT_LOST)
        else:
            self._fail(error)

    def stop(self, number: signal.Signals) -> NoReturn:
        """Sends a leader the end of the session, and ends the process. Called from a thread of its own."""
        self._claim_end()
        if self._heartbeat is not None:
            self._heartbeat.stop(Reason("it was stopped there"))
        _exit(128 + number)

    def _claim_end(self) -> None:
        """Makes the calling thread the one that reports the reason and ends this process."""
        self._ending_thread = threading.current_thread()
        self._ended.set()

    def _fail(self, error: BaseException) -> None:
        """Sends the reason to the leader, and ends the process."""
        if self._ending_thread is not threading.current_thread() and self._ended.wait(cause_grace(error)):
            # `error` is a symptom: another thread reports the cause and ends the process.
            time.sleep(_EXIT_GRACE)
        if isinstance(error, SparkError):
            logger.error("The follower ends: %s.", error)
            details = ""
        else:
            logger.error("The follower's worker failed.", exc_info=error)
            import traceback

            details = "".join(traceback.format_exception(error))
        sentence = str(error) if isinstance(error, SparkError) else described(error)
        if self._heartbeat is not None:
            self._heartbeat.send(Kind.FAILURE, Reason(sentence, details))
            self._heartbeat.stop(timeout=2.0)
        code = getattr(error, "exit_code", 1)
        # Without --once such an exit code would end `join`, and the next leader may fit.
        _exit(1 if code in (EXIT_USAGE, EXIT_REFUSED) and not self._once else code)


def _load_vllm() -> None:
    """Imports vLLM before connecting: it takes seconds, in which a connected follower could not send heartbeats."""
    from vllm_spark.compat.check import check_vllm

    check_vllm()
    importlib.import_module("vllm.v1.worker.worker_base")


def _exit(code: int) -> NoReturn:
    """Ends the process at once: other threads may hang in a collective or a process group."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
