"""A vLLM worker extension for tests: a worker method that FAILING_IN names raises on the ranks of FAILING_RANKS.

The follower's comes two seconds late.
"""

from __future__ import annotations

import os
import time
from typing import Any

from vllm.v1.worker.worker_base import WorkerWrapperBase

method = os.environ["FAILING_IN"]
ranks = {int(rank) for rank in os.environ["FAILING_RANKS"].split()}
original = getattr(WorkerWrapperBase, method, None)


def fail(self: WorkerWrapperBase, *args: Any, **kwargs: Any) -> Any:
    """Raises, or does what it did."""
    if self.global_rank in ranks:
        if self.global_rank == 1:
            time.sleep(2)
        raise ValueError(f"planted failure of rank {self.global_rank}.")
    return original(self, *args, **kwargs) if original else getattr(self.worker, method)(*args, **kwargs)


setattr(WorkerWrapperBase, method, fail)


class Failing:
    """Adds nothing."""
