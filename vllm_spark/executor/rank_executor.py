"""vLLM's executor of one worker, for either rank of a pair: vLLM's own code sets up the worker on both.

`RankExecutor` is the shared part. `FollowerExecutor` is the follower's class; the leader's is in `leader_executor`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from vllm.platforms import current_platform
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.worker.worker_base import WorkerWrapperBase

from vllm_spark.backend.memory_need import reserved_bytes, shares_memory
from vllm_spark.backend.pair_status.records import RailFacts, RankFacts
from vllm_spark.collective import Runtime, installed
from vllm_spark.collective.rails import link_rate
from vllm_spark.collective.runtime import region_bytes
from vllm_spark.compat.patching import apply_all
from vllm_spark.config.settings import SparkConfig
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.group_connection import GroupConnection
from vllm_spark.executor.handshake.versions import Versions
from vllm_spark.executor.store import INIT_METHOD, open_groups
from vllm_spark.kernels import runtime as tuning
from vllm_spark.memory.page_cache import PageCacheEviction
from vllm_spark.ranks import FOLLOWER_RANK, WORLD_SIZE

logger = logging.getLogger("vllm_spark")


class RankExecutor(UniProcExecutor):  # type: ignore[misc]
    """vLLM's executor with one worker in this process, which is rank `rank` of the pair."""

    rank: int
    _worker: WorkerWrapperBase | None = None

    def load_worker(
        self, groups: GroupConnection, runtime: Runtime, weight_files: Iterable[Path], *, own_process: bool
    ) -> None:
        """Makes this rank's worker, with its half of the model loaded, as vLLM does for a model on one machine.

        Args:
            groups: this rank's end of the groups connection, over which torch's process groups are opened.
            runtime: this rank's end of the collectives.
            weight_files: that are loaded; evicted from the page cache where weights are in the same memory.
            own_process: whether this process runs nothing but this rank; False in a user's own process.
        """
        _limit_torch_threads(runtime)
        if own_process:
            _limit_numba_threads()
        open_groups(groups, self.rank, timedelta(seconds=runtime.options.timeout_s))
        apply_all("serving")
        tuning.start(self.vllm_config)
        with PageCacheEviction(weight_files if shares_memory() else ()):
            UniProcExecutor._init_executor(self)
        tuning.model_loaded(self.driver_worker)

    def describe(self, config: SparkConfig) -> RankFacts:
        """What this rank consists of, once its worker is loaded and warmed up.

        Args:
            config: this machine's settings.
        """
        runtime, worker = installed(), self.driver_worker
        assert runtime is not None
        assert worker is not None
        model = worker.get_model()
        measured = int(getattr(worker.model_runner, "model_memory_usage", 0))  # by vLLM, on a GPU
        return RankFacts(
            rank=self.rank,
            host=host_name(),
            process=os.getpid(),
            device=str(current_platform.get_device_name()),
            versions=Versions.of_this_process().packages(),
            tables=tuning.tables_in_use(),
            rails=[RailFacts(rail.device, rail.port, link_rate(rail), rail.mtu) for rail in runtime.rails],
            weights=measured or _bytes_of([*model.parameters(), *model.buffers()]) or 0,
            kv_cache=_bytes_of(getattr(worker.model_runner, "kv_caches", None)),
            region=region_bytes(runtime.options),
            reserve=reserved_bytes(config),
            memory=psutil.virtual_memory().total,
        )

    @property
    def driver_worker(self) -> WorkerWrapperBase | None:
        """The worker; None before the start and after the end."""
        return self._worker

    @driver_worker.setter
    def driver_worker(self, worker: WorkerWrapperBase | None) -> None:
        # vLLM numbers workers per executor, and assigns the worker before it sets it up. This one is its rank's from
        # then on: extensions ask for it, and the worker takes its own part of what a call has for each rank.
        if worker is not None:
            worker.global_rank = self.rank
        self._worker = worker

    def _distributed_args(self) -> tuple[str, int, int]:
        return INIT_METHOD, self.rank, 0


class FollowerExecutor(RankExecutor):
    """The follower's executor: the leader's calls are run on its `driver_worker`.

    Args:
        vllm_config: the leader's configuration.
        groups: this rank's end of the groups connection.
        runtime: this rank's end of the collectives.
        weight_files: that are loaded.
    """

    rank = FOLLOWER_RANK

    def __init__(
        self, vllm_config: Any, groups: GroupConnection, runtime: Runtime, weight_files: Iterable[Path]
    ) -> None:
        self._groups, self._runtime, self._weight_files = groups, runtime, weight_files
        super().__init__(vllm_config)

    def _init_executor(self) -> None:
        self.load_worker(self._groups, self._runtime, self._weight_files, own_process=True)


def _bytes_of(tensors: Any) -> int | None:
    """Bytes of tensors, each storage counted once; None if there are none.

    Args:
        tensors: a tensor, or lists and dictionaries of them.
    """
    storages: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            add(list(value.values()))
        elif isinstance(value, list | tuple):
            for each in value:
                add(each)

    add(tensors)
    return sum(storages.values()) if storages else None


def _limit_torch_threads(runtime: Runtime) -> None:
    """Halves torch's number of threads if both ranks compute on the cores of this machine.

    OpenMP's threads spin while they wait: two ranks with one thread per core each are about 15 times slower than one.
    A number that the user chose (OMP_NUM_THREADS) stays.
    """
    if runtime.options.transport == "verbs" or not current_platform.is_cpu() or "OMP_NUM_THREADS" in os.environ:
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // WORLD_SIZE))
    logger.info(
        "Both ranks are on this machine: each uses %d of %d threads (set OMP_NUM_THREADS for another number).",
        torch.get_num_threads(),
        threads,
    )


def _limit_numba_threads() -> None:
    """One thread for vLLM's n-gram speculation on CPUs, unless the user has chosen a number.

    vLLM uses only one, and numba's other threads spin while they wait: two ranks on two cores took 0.2 s per step. To
    be called before numba is imported, in a process that runs only this rank.
    """
    if current_platform.is_cpu() and "numba" not in sys.modules:
        os.environ.setdefault("NUMBA_NUM_THREADS", "1")
