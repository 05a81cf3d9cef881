"""A whole first run on this machine: connection, steps, report file."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vllm_spark.bench.connection import await_connection, open_connection
from vllm_spark.collective.cuda_runtime import KERNELS
from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor.gpu.reading import GB10, find_gpu
from vllm_spark.doctor.system import System
from vllm_spark.errors import EXIT_LOST, EXIT_PROBLEM, EXIT_WARNINGS, PeerLostError, SparkError, StoppedError
from vllm_spark.executor.channel.addresses import host_name, leader_address, leader_endpoint
from vllm_spark.executor.channel.framing import ChannelError
from vllm_spark.executor.channel.secret import load_secret
from vllm_spark.first_run.context import Context, Greeting, Plan
from vllm_spark.first_run.peer import Peer, PeerFailedError
from vllm_spark.first_run.report import Report, kernel_messages
from vllm_spark.first_run.result import Status, StepResult
from vllm_spark.first_run.sequence import run_steps
from vllm_spark.processes.signals import StopRequest, raise_on_stop_signals
from vllm_spark.records import RecordError, from_json, to_json

COMMAND = "vllm-spark doctor --first-run"
_END_SECONDS = 30.0
"""Limit for the steps to end after a signal; then the process exits with them."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        listens: whether this is the machine with --listen, which determines what is run.
        patience: seconds to wait for the other machine.
        report: the file to write.
        collectives: number of random collectives; None for the default of the device.
        pull: whether the user is asked to pull a cable.
    """

    listens: bool
    patience: float
    report: Path
    collectives: int | None
    pull: bool


class FirstRun:
    """One run on this machine.

    Args:
        request: what the user asked for.
        config: this machine's settings.
        note: prints a line while a step runs.
        show: prints the result of a step.
    """

    def __init__(
        self, request: Request, config: SparkConfig, note: Callable[[str], None], show: Callable[[StepResult], None]
    ) -> None:
        self._request, self._config, self._note, self._show = request, config, note, show
        self._system = System()
        self._report = Report.begin(0 if request.listens else 1, host_name(), config)
        self._peer: Peer | None = None
        self._lost = False
        self._ended = threading.Event()  # no step runs
        self._ended.set()
        self._started = time.monotonic()
        self._error: BaseException | None = None
        self.report_written = False

    def run(self) -> int:
        """Runs all steps, writes the report, and returns the exit code.

        Signals must raise StopRequest: in the main thread.

        Raises:
            SparkError: the machines did not connect; or the report cannot be written.
            StoppedError: a signal ended the run.
        """
        former = raise_on_stop_signals()
        try:
            return self._run()
        except StopRequest as request:
            number = int(request.args[0])
            raise StoppedError(self._stop(signal.Signals(number).name), number) from None
        except SparkError as error:
            if not self._report.steps:
                self._add_connection("failed", seen=str(error))
            self._report.reason = self._report.reason or str(error)
            self._report.result = "failed"
            raise
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
            if self._peer is not None:
                self._peer.close()
            self._report.seconds = round(time.monotonic() - self._started, 3)
            self._report.kernel_messages = kernel_messages(self._system)
            self._report.write(self._request.report, self._secret())
            self.report_written = True

    def _run(self) -> int:
        connect = await_connection if self._request.listens else open_connection
        self._note("waiting for the other machine" if self._request.listens else "connecting to the other machine")
        self._peer = Peer(connect(self._config, self._request.patience, COMMAND))
        context = self._greet(self._peer)
        self._add_connection("passed", value=f"{self._peer.name}, the same versions and secret")
        # The steps have a thread of their own: the main thread handles signals while native code waits.
        thread = threading.Thread(target=self._run_steps, args=(context,), name="spark-steps", daemon=True)
        self._ended.clear()
        thread.start()
        # Not `join`: a signal that interrupts it makes Python 3.11 take the thread for ended.
        while not self._ended.wait(0.2):
            pass
        if self._error is not None:
            raise self._error
        return self._exit_code()

    def _greet(self, peer: Peer) -> Context:
        request = self._request
        chip = find_gpu(self._system)
        mine = Greeting(
            host_name(),
            chip is not None and _usable_gpu(),
            "" if chip is None else chip.model,
            Plan.of(self._config, request.collectives, request.pull) if request.listens else None,
        )
        try:
            theirs = from_json(peer.exchange(to_json(mine)), Greeting)
        except (RecordError, ChannelError) as error:
            side = "--connect" if request.listens else "--listen"
            raise SparkError(
                f"{peer.name} runs another program ({error}); run {COMMAND} {side} there, and neither vllm-spark join "
                "nor vllm serve meanwhile"
            ) from None
        plan = mine.plan or theirs.plan
        if plan is None:
            raise SparkError("both machines were started with --connect; start one with --listen")
        peer.name = f"the other machine ({theirs.first_run_host})"
        device = "cuda" if mine.has_gpu and theirs.has_gpu else "cpu"
        limits_apply = GB10 in mine.gpu and GB10 in theirs.gpu
        report = self._report
        report.peer, report.gpu, report.peer_gpu = theirs.first_run_host, mine.gpu, theirs.gpu
        report.device, report.limits_apply = device, limits_apply
        if device == "cpu":
            without = " and ".join(
                name for name, has in (("this machine", mine.has_gpu), (peer.name, theirs.has_gpu)) if not has
            )
            self._note(f"without a usable GPU on {without}, collectives use CPU tensors")
        rank = 0 if request.listens else 1
        return Context(rank, plan, plan.applied_to(self._config), peer, self._system, device, limits_apply, self._note)

    def _run_steps(self, context: Context) -> None:
        try:
            for result in run_steps(context, self._show):
                self._report.steps.append(result)
                self._report.machine = context.machine
            self._conclude(context.peer)
        except BaseException as error:  # raised again in the main thread
            self._error = error
        finally:
            self._ended.set()

    def _conclude(self, peer: Peer) -> None:
        statuses = [result.status for result in self._report.steps]
        last = self._report.steps[-1]
        if last.status in ("failed", "stopped"):
            self._report.result = last.status
            self._report.reason = f"step {last.name} ({last.title}): {last.sentence}"
            self._lost = isinstance(peer.failure, PeerLostError) and not isinstance(peer.failure, PeerFailedError)
        else:
            self._report.result = "warning" if "warning" in statuses else "passed"

    def _add_connection(self, status: Status, value: str = "", seen: str = "") -> None:
        """Adds the connection to the report, as its first step; the command prints the error of one that failed."""
        seconds = round(time.monotonic() - self._started, 3)
        result = StepResult("connection", "Connection", status, seconds, value, seen)
        self._report.steps.append(result)
        if status == "passed":
            self._show(result)

    def _stop(self, name: str) -> str:
        """Ends the steps on both machines; returns the sentence for this one's user."""
        where = "while waiting for the other machine"
        if self._peer is not None:
            done = max(0, len(self._report.steps) - 1)  # but the connection
            where = f"after {done} steps, and the other machine was notified"
            self._peer.stop(name)
            self._ended.wait(_END_SECONDS)
        # Last: the step that was ended has a result of its own.
        self._report.result = "stopped"
        self._report.reason = f"stopped by {name}"
        return f"stopped by {name} {where}"

    def _exit_code(self) -> int:
        if self._report.result in ("failed", "stopped"):
            return EXIT_LOST if self._lost and self._report.result == "stopped" else EXIT_PROBLEM
        return EXIT_WARNINGS if self._report.result == "warning" else 0

    def _secret(self) -> str:
        try:
            address = leader_address(self._config) if self._request.listens else leader_endpoint(self._config)[0]
            return os.fsdecode(load_secret(self._config, address))
        except SparkError:
            return ""


def _usable_gpu() -> bool:
    """Whether collectives can use a GPU here."""
    if not KERNELS.exists():
        return False
    import torch

    return bool(torch.cuda.is_available())
