"""vLLM's executor of one worker, for either rank of a pair: vLLM's own code sets up the worker on both.

`RankExecutor` is the shared part. `FollowerExecutor` is the follower's class; the leader's is in `leader_executor`.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_spark.compat.patching import apply_all
from vllm_spark.executor.group_connection import GroupConnection
from vllm_spark.executor.store import INIT_METHOD, open_groups
from vllm_spark.kernels import runtime as tuning
from vllm_spark.ranks import FOLLOWER_RANK


class RankExecutor(UniProcExecutor):  # type: ignore[misc]
    """vLLM's executor with one worker in this process, which is rank `rank` of the pair."""

    rank: int

    def load_worker(self, groups: GroupConnection) -> None:
        """Makes this rank's worker, with its half of the model loaded, as vLLM does for a model on one machine.

        Args:
            groups: this rank's end of the groups connection, over which torch's process groups are opened.
        """
        open_groups(groups, self.rank)
        apply_all("serving")
        tuning.start(self.vllm_config)
        UniProcExecutor._init_executor(self)
        # vLLM numbers workers per executor. This one takes its own rank's part of what a call has for each rank.
        self.driver_worker.global_rank = self.rank
        tuning.log_expert_backends(self.driver_worker)

    def _distributed_args(self) -> tuple[str, int, int]:
        return INIT_METHOD, self.rank, 0


class FollowerExecutor(RankExecutor):
    """The follower's executor: the leader's calls are run on its `driver_worker`.

    Args:
        vllm_config: the leader's configuration.
        groups: this rank's end of the groups connection.
    """

    rank = FOLLOWER_RANK

    def __init__(self, vllm_config: Any, groups: GroupConnection) -> None:
        self._groups = groups
        super().__init__(vllm_config)

    def _init_executor(self) -> None:
        self.load_worker(self._groups)
