"""`vllm-spark join`: supervises the follower's sessions, each in a process of its own (`follower_process`)."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import time
from types import FrameType

from vllm_spark.compat.check import check_vllm
from vllm_spark.config.settings import SparkConfig, flag_name
from vllm_spark.errors import EXIT_LOST, EXIT_REFUSED, EXIT_USAGE, SparkError
from vllm_spark.executor.channel.addresses import leader_endpoint
from vllm_spark.executor.channel.secret import load_secret
from vllm_spark.executor.environment import Environment, merge_environment
from vllm_spark.processes.child import KILL_SECONDS, end_with_parent, python_module
from vllm_spark.records import from_json, to_json
from vllm_spark.variables import internal_name

logger = logging.getLogger("vllm_spark")

PREFIX_VARIABLE = internal_name("flag_prefix")
"""Holds the prefix of the flags of the command that was typed, for messages of a session's process."""

CONFIG_VARIABLE = internal_name("follower_config")
"""Holds the settings for a session's process, as JSON."""

ONCE_VARIABLE = internal_name("follower_once")
"""Set to a non-empty value for a session's process that ends at the first refusal."""

ADOPTED_VARIABLE = internal_name("adopted_environment")
"""Holds the leader's environment with which a session's process was started, as JSON; absent without one."""

RESULT_VARIABLE = internal_name("follower_result")
"""Holds the descriptor of a file for the result of a session's process."""

EXIT_RESTART = 75
"""Exit code of a session whose leader has another environment, which is its result: the next one starts with that."""

_SESSION_MODULE = "vllm_spark.entrypoints.follower_process"
_STOP_GRACE = 3.0  # seconds for a session to end in order
_SHORT_SESSION = 5.0  # seconds; after crashes sooner than that the delay before the next session grows
_FIRST_DELAY, _MAX_DELAY = 1.0, 30.0


def supervise(config: SparkConfig, *, once: bool) -> int:
    """Runs one session after the other until stopped, or (with `once`) until the first one has ended or was refused.

    It also ends for errors that a retry cannot remove: the leader has another secret, or other versions.

    Returns:
        The exit code of the command: 0 when stopped, else that of the last session.

    Raises:
        ConfigurationError: vLLM, the leader's address or the secret is missing or unusable.
    """
    check_vllm()
    load_secret(config, leader_endpoint(config)[0])  # reports its errors now, and not in the session's process
    with _Supervisor(config, once) as supervisor:
        return _supervise(supervisor, once)


def _supervise(supervisor: _Supervisor, once: bool) -> int:
    delay = _FIRST_DELAY
    while True:
        started = time.monotonic()
        code = supervisor.run_one()
        if supervisor.stopped:
            logger.info("Stopped by %s.", supervisor.stopped.name)
            return 0
        if code == EXIT_RESTART:
            logger.info("The next process starts with the leader's environment.")
            continue
        if code in (EXIT_USAGE, EXIT_REFUSED):
            return code
        if once:
            if code < 0:
                logger.error("The session %s.", _describe_end(code))
            return code if code >= 0 else 128 - code
        if code in (0, EXIT_LOST):
            delay = _FIRST_DELAY
            continue
        logger.error("The session %s; waiting for the next leader.", _describe_end(code))
        if time.monotonic() - started < _SHORT_SESSION:
            supervisor.sleep(delay)
            delay = min(2 * delay, _MAX_DELAY)


def _describe_end(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL (by hand, or by the kernel's OOM killer: see dmesg)"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class _Supervisor:
    """Starts session processes, and ends them with this one.

    A context manager for the main thread, in which SIGTERM and SIGINT request the end.
    """

    def __init__(self, config: SparkConfig, once: bool) -> None:
        self._config, self._once = config, once
        self._leader: Environment | None = None  # from the last session that ended with EXIT_RESTART
        self.stopped: signal.Signals | None = None

    def __enter__(self) -> _Supervisor:
        # A signal writes a byte into this pipe, so that the main thread's wait ends and it checks `stopped`.
        self._signalled, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._former_wake = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_wake)
        os.close(self._signalled)
        os.close(self._wake)

    def run_one(self) -> int:
        """Runs a session to its end and returns its exit code (negative for a signal)."""
        if self.stopped:
            return 0
        result = os.memfd_create("vllm-spark-session-result", os.MFD_CLOEXEC)
        try:
            code = self._run(result)
            if code == EXIT_RESTART:
                content = os.pread(result, os.fstat(result).st_size, 0)
                self._leader = from_json(content, Environment)
            return code
        finally:
            os.close(result)

    def _run(self, result: int) -> int:
        process = subprocess.Popen(
            python_module(_SESSION_MODULE),
            env=self._environment(result),
            pass_fds=[result],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent(os.getpid()),
        )
        end = os.pidfd_open(process.pid)
        try:
            while not self.stopped and end not in self._wait([end, self._signalled], None):
                pass
            if self.stopped:
                process.terminate()
                self._wait([end], _STOP_GRACE)
        finally:
            os.close(end)
            # Also ends compilers and other processes that the session may have left.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        try:
            return process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            raise SparkError(
                f"the session (process {process.pid}) survives SIGKILL: it hangs in a driver or in disk I/O; "
                "restart this machine"
            ) from None

    def _environment(self, result: int) -> dict[str, str]:
        own = {CONFIG_VARIABLE: self._config.model_dump_json(), RESULT_VARIABLE: str(result)}
        own[ONCE_VARIABLE] = "1" if self._once else ""
        own[PREFIX_VARIABLE] = flag_name("")
        if self._leader is None:
            return {**os.environ, **own}
        return {
            **merge_environment(os.environ, self._leader),
            **own,
            ADOPTED_VARIABLE: to_json(self._leader).decode(),
        }

    def sleep(self, seconds: float) -> None:
        """Waits, at most until a stop is requested."""
        if not self.stopped:
            self._wait([self._signalled], seconds)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = signal.Signals(number)

    @staticmethod
    def _wait(descriptors: list[int], timeout: float | None) -> list[int]:
        return select.select(descriptors, [], [], timeout)[0]
