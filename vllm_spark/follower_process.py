"""The process of one follower's session: `vllm_spark.following` starts one for each leader.

Everything that a follower may be asked for comes together here: a leader's work, and a doctor's examination.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

from vllm_spark.config import SparkConfig
from vllm_spark.doctor.visit import answer
from vllm_spark.errors import RefusedError, SparkError, VersionsError
from vllm_spark.executor.follower import FollowerSession
from vllm_spark.following import CONFIG_VARIABLE, ONCE_VARIABLE
from vllm_spark.logs import log_as

logger = logging.getLogger("vllm_spark")


def main() -> int:
    """Entry of a session's process; the settings come as JSON in the environment."""
    log_as("vllm-spark join")
    config = SparkConfig.model_validate_json(os.environ.pop(CONFIG_VARIABLE))
    once = bool(os.environ.pop(ONCE_VARIABLE, ""))
    session = FollowerSession(config, answer, once=once)
    _stop_on_signal(session)
    try:
        session.run()
    except SparkError as error:
        logger.error("%s.", error)
        heals = isinstance(error, RefusedError) and not isinstance(error, VersionsError)
        return 1 if heals and not once else error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _stop_on_signal(session: FollowerSession) -> None:
    """Has a thread wait for SIGTERM: the main thread may be in a collective when it comes."""
    awaited = {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)  # before any other thread exists: they inherit it

    def wait() -> None:
        session.stop(signal.Signals(signal.sigwait(awaited)))

    threading.Thread(target=wait, name="spark-stop", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
