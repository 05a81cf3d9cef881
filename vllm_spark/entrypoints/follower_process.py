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
    """Waits for SIGTERM in a thread, because the main thread may be in a collective."""
    awaited = {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)  # before any other thread exists: they inherit it

    def wait() -> None:
        session.stop(signal.Signals(signal.sigwait(awaited)))

    threading.Thread(target=wait, name="spark-stop", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
