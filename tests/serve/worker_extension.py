"""A vLLM worker extension for tests: lets a request reach into one rank's worker."""

from __future__ import annotations

import torch


class PlantedDrift:
    """Mixed into the worker by `--worker-extension-cls`; called through `/collective_rpc`."""

    rank: int

    def draw_once_on(self, rank: int) -> bool:
        """One draw too many from the global generator of one rank."""
        if self.rank == rank:
            torch.rand(1)
        return self.rank == rank
