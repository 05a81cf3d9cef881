"""Follows one leader after the other: the second machine's part, with a process for each leader."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
from types import FrameType

from vllm_spark.compat import check_vllm
from vllm_spark.config import SparkConfig
from vllm_spark.errors import EXIT_LOST, EXIT_REFUSED, EXIT_USAGE
from vllm_spark.executor.link import leader_endpoint
from vllm_spark.executor.secret import load_secret
from vllm_spark.process import end_with_parent

logger = logging.getLogger("vllm_spark")

CONFIG_VARIABLE = "_SPARK_FOLLOWER_CONFIG"
"""In which a session's process finds its settings, as JSON."""

_SESSION = "vllm_spark.follower_process"
# A folder named vllm_spark where the user happens to be must not become a session's package (Python 3.11 and later).
_SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []
_STOP_GRACE = 3.0  # seconds for a session to say goodbye
_SHORT_SESSION = 5.0  # seconds; a session that crashed sooner is restarted more slowly each time
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


def follow_leaders(config: SparkConfig, *, once: bool) -> int:
    """Runs a session process per leader until refused, stopped, or (with `once`) the first leader left.

    Returns:
        The exit code of the command: 0 when stopped, else that of the last session.

    Raises:
        ConfigurationError: no vLLM, leader's address or secret that could work.
    """
    check_vllm()
    load_secret(config, leader_endpoint(config)[0])  # for its errors: better now than in a process of its own
    sessions = _Sessions(config)
    pause = _FIRST_PAUSE
    while True:
        started = time.monotonic()
        code = sessions.run_one()
        if sessions.stopped:
            logger.info("Stopped by %s.", sessions.stopped.name)
            return 0
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


class _Sessions:
    """Starts session processes and makes sure that none outlives this one."""

    def __init__(self, config: SparkConfig) -> None:
        self._config = config
        self.stopped: signal.Signals | None = None
        # A signal is one byte in this pipe: whatever the main thread waits for, it wakes up and sees `stopped`.
        self._signalled, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)

    def run_one(self) -> int:
        """Runs a session to its end and returns its exit code (negative for a signal)."""
        if self.stopped:
            return 0
        process = subprocess.Popen(
            [sys.executable, *_SAFE_PATH, "-m", _SESSION],
            env={**os.environ, CONFIG_VARIABLE: self._config.model_dump_json()},
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
        return process.wait()

    def pause(self, seconds: float) -> None:
        """Waits, but not on when asked to stop."""
        if not self.stopped:
            self._wait([self._signalled], seconds)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = signal.Signals(number)

    @staticmethod
    def _wait(descriptors: list[int], timeout: float | None) -> list[int]:
        return select.select(descriptors, [], [], timeout)[0]
