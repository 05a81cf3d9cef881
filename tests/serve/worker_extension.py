"""A vLLM worker extension for tests: lets a request reach into one rank's worker."""

from __future__ import annotations

import torch


class Saboteur:
    """Mixed into the worker by `--worker-extension-cls`; called through `/collective_rpc`."""

    rank: int

    def draw_once_on(self, rank: int) -> bool:
        """One draw too many from the global generator of one rank."""
        if self.rank == rank:
            torch.rand(1)
        return self.rank == rank

    def fail_on(self, rank: int) -> None:
        """Raises on one rank, while the other waits for it in an all-reduce."""
        from vllm_spark.collective import installed

        if self.rank == rank:
            raise RuntimeError("planted failure")
        runtime = installed()
        assert runtime is not None
        runtime.all_reduce(torch.ones(8))
