"""The process of one follower session, started by `vllm_spark.entrypoints.join`.

It answers both peers that a follower may meet: a leader, and `vllm-spark doctor`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

from vllm_spark.backend.logging import log_as
from vllm_spark.config.settings import SparkConfig, flags_named
from vllm_spark.doctor.remote import send_report
from vllm_spark.entrypoints.join import (
    ADOPTED_VARIABLE,
    CONFIG_VARIABLE,
    EXIT_RESTART,
    ONCE_VARIABLE,
    PREFIX_VARIABLE,
    RESULT_VARIABLE,
)
from vllm_spark.errors import RefusedError, SparkError, VersionsError
from vllm_spark.executor.environment import Environment, RestartError
from vllm_spark.executor.follower_session import FollowerSession
from vllm_spark.records import from_json, to_json

logger = logging.getLogger("vllm_spark")


def main() -> int:
    """Runs the session; settings, and the leader's environment if there is one, are JSON in environment variables."""
    log_as("vllm-spark join")
    config = SparkConfig.model_validate_json(os.environ.pop(CONFIG_VARIABLE))
    result = int(os.environ.pop(RESULT_VARIABLE))
    once = bool(os.environ.pop(ONCE_VARIABLE, ""))
    adopted = os.environ.pop(ADOPTED_VARIABLE, None)
    environment = None if adopted is None else from_json(adopted, Environment)
    session = FollowerSession(config, send_report, once=once, adopted=environment)
    _stop_on_signal(session)
    try:
        with flags_named(os.environ.pop(PREFIX_VARIABLE)):
            session.run()
    except SparkError as error:
        logger.error("%s.", error)
        retryable = isinstance(error, RefusedError) and not isinstance(error, VersionsError)
        return 1 if retryable and not once else error.exit_code
    except RestartError as restart:
        os.write(result, to_json(restart.environment))
        return EXIT_RESTART
    except KeyboardInterrupt:
        return 130
    return 0


def _stop_on_signal(session: FollowerSession) -> None:
    """Has a thread wait for SIGTERM, because the main thread may be in a collective.

    The thread reads what Python's handler in C writes, in whichever thread it runs. `sigwait` would need the signal
    blocked in all threads, and multiprocessing's resource tracker, once started, leaves it unblocked in the main one.
    """
    received, wake = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)

    def wait() -> None:
        while os.read(received, 1)[0] != signal.SIGTERM:  # another signal that Python handles
            pass
        session.stop(signal.SIGTERM)

    threading.Thread(target=wait, name="spark-stop", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
