"""Follows one leader after the other: the second machine's part, with a process for each leader."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import time
from types import FrameType

import msgspec

from vllm_spark.compat.check import check_vllm
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import EXIT_LOST, EXIT_REFUSED, EXIT_USAGE, SparkError
from vllm_spark.executor.channel.addresses import leader_endpoint
from vllm_spark.executor.channel.secret import load_secret
from vllm_spark.executor.environment import Environment, merge_environment
from vllm_spark.processes.child import KILL_SECONDS, end_with_parent, python_module

logger = logging.getLogger("vllm_spark")

CONFIG_VARIABLE = "_SPARK_FOLLOWER_CONFIG"
"""In which a session's process finds its settings, as JSON."""

ONCE_VARIABLE = "_SPARK_FOLLOWER_ONCE"
"""In which it finds whether the first refusal is the last (any value but an empty one)."""

ADOPTED_VARIABLE = "_SPARK_ADOPTED_ENVIRONMENT"
"""In which it finds the leader's environment that was laid over this one's for it, as JSON; absent without one."""

RESULT_VARIABLE = "_SPARK_FOLLOWER_RESULT"
"""In which it finds the descriptor of a file for its result."""

EXIT_RESTART = 75
"""With which a session ends whose leader has another environment: its result, with which the next one starts."""

_SESSION = "vllm_spark.entrypoints.follower_process"
_STOP_GRACE = 3.0  # seconds for a session to say goodbye
_SHORT_SESSION = 5.0  # seconds; a session that crashed sooner is restarted more slowly each time
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


def supervise(config: SparkConfig, *, once: bool) -> int:
    """Runs a session process per leader until stopped, or (with `once`) the first leader left or refused.

    It also ends for what no waiting heals: the leader has another secret, or other versions.

    Returns:
        The exit code of the command: 0 when stopped, else that of the last session.

    Raises:
        ConfigurationError: no vLLM, leader's address or secret that could work.
    """
    check_vllm()
    load_secret(config, leader_endpoint(config)[0])  # for its errors: better now than in a process of its own
    with _Supervisor(config, once) as sessions:
        return _follow(sessions, once)


def _follow(sessions: _Supervisor, once: bool) -> int:
    pause = _FIRST_PAUSE
    while True:
        started = time.monotonic()
        code = sessions.run_one()
        if sessions.stopped:
            logger.info("Stopped by %s.", sessions.stopped.name)
            return 0
        if code == EXIT_RESTART:
            logger.info("The next process starts with the leader's environment.")
            continue
        if code in (EXIT_USAGE, EXIT_REFUSED):
            return code
        if once:
            if code < 0:
                logger.error("The session %s.", _end_in_words(code))
            return code if code >= 0 else 128 - code
        if code in (0, EXIT_LOST):
            pause = _FIRST_PAUSE
            continue
        logger.error("The session %s; waiting for the next leader.", _end_in_words(code))
        if time.monotonic() - started < _SHORT_SESSION:
            sessions.pause(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _end_in_words(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL, as somebody does by hand and the kernel does when memory runs out"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class _Supervisor:
    """Starts session processes and makes sure that none outlives this one.

    A context manager for the main thread, in which SIGTERM and SIGINT ask for the end.
    """

    def __init__(self, config: SparkConfig, once: bool) -> None:
        self._config, self._once = config, once
        self._leader: Environment | None = None  # the environment of the last leader that had another one
        self.stopped: signal.Signals | None = None

    def __enter__(self) -> _Supervisor:
        # A signal is one byte in this pipe: whatever the main thread waits for, it wakes up and sees `stopped`.
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
                self._leader = msgspec.json.decode(content, type=Environment)
            return code
        finally:
            os.close(result)

    def _run(self, result: int) -> int:
        process = subprocess.Popen(
            python_module(_SESSION),
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
            # Also compilers and other helpers that the session may have left.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        try:
            return process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            raise SparkError(
                f"the session (process {process.pid}) survives SIGKILL: its driver or disk does not let go of it; "
                "restart this machine"
            ) from None

    def _environment(self, result: int) -> dict[str, str]:
        ours = {CONFIG_VARIABLE: self._config.model_dump_json(), RESULT_VARIABLE: str(result)}
        ours[ONCE_VARIABLE] = "1" if self._once else ""
        if self._leader is None:
            return {**os.environ, **ours}
        return {
            **merge_environment(os.environ, self._leader),
            **ours,
            ADOPTED_VARIABLE: msgspec.json.encode(self._leader).decode(),
        }

    def pause(self, seconds: float) -> None:
        """Waits, but not on when asked to stop."""
        if not self.stopped:
            self._wait([self._signalled], seconds)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = signal.Signals(number)

    @staticmethod
    def _wait(descriptors: list[int], timeout: float | None) -> list[int]:
        return select.select(descriptors, [], [], timeout)[0]
