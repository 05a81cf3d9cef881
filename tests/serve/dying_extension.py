"""A vLLM worker extension for tests: rank 1 dies, when its worker is made or in the worker method that DYING_IN names.

When its worker is made there are no process groups yet; the methods of the start come after them.
"""

from __future__ import annotations

import os
import signal
from typing import Any


def die(*_: Any, **__: Any) -> None:
    """As after `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


if (method := os.environ.get("DYING_IN")) is not None:  # the follower's variable alone
    if not method:
        die()
    else:
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        setattr(WorkerWrapperBase, method, die)


class Dying:
    """Adds nothing."""
