"""A vLLM worker extension for tests: the warm-up of the rank HANGING_RANK ends, and the rank does not return from it.

As for the lock of a compiler's cache, which a killed process has left. HANGING_RANK is empty for none.
"""

from __future__ import annotations

import os
import time
from typing import Any

from vllm.v1.worker.worker_base import WorkerWrapperBase

HANG_SECONDS = 120.0


def hang(self: WorkerWrapperBase) -> Any:
    """Warms up, and does not return for a while on that rank."""
    result = self.worker.compile_or_warm_up_model()
    if os.environ["HANGING_RANK"] == str(self.global_rank):
        time.sleep(HANG_SECONDS)
    return result


WorkerWrapperBase.compile_or_warm_up_model = hang


class Hanging:
    """Adds nothing."""
