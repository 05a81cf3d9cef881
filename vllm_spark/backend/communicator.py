"""vLLM's communicators, with every collective that the runtime takes routed through it.

What it does not take (a type, a size, another group of ranks) goes to vLLM's own path and is counted.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator

from vllm_spark.backend.process_group import connecting
from vllm_spark.collective import Runtime, count_fallback, installed

logger = logging.getLogger("vllm_spark")

_NCCL_SECONDS = 120.0  # for both ranks to come to it and to connect
_ROUTED_GROUPS = ("tp", "ep")


class _Routing:
    """Mixed into a vLLM communicator: the runtime first, the base class for the rest."""

    unique_name: str
    world_size: int
    rank_in_group: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (runtime := self._runtime) is not None:
            logger.info("Group %s: collectives go through vllm_spark, %s.", self.unique_name, runtime.path)

    @property
    def _runtime(self) -> Runtime | None:
        """The runtime, for the groups that consist of its two ranks and are used by the model."""
        runtime = installed()
        if runtime is None or self.world_size != runtime.world_size:
            return None
        return runtime if self.unique_name.partition(":")[0] in _ROUTED_GROUPS else None

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """The sum over both ranks as a fresh tensor; `input_` stays as it is."""
        runtime = self._runtime
        if runtime is not None and runtime.accepts_all_reduce(input_):
            return runtime.all_reduce(input_)
        self._count()
        return super().all_reduce(input_)  # type: ignore[misc]

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Both ranks' inputs, concatenated along `dim` in rank order."""
        runtime = self._runtime
        if runtime is not None and runtime.accepts_all_gather(input_, dim):
            return runtime.all_gather(input_, dim)
        self._count()
        return super().all_gather(input_, dim)  # type: ignore[misc]

    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        """As `all_gather`, on rank `dst` alone; None on the other."""
        runtime = self._runtime
        if runtime is not None and runtime.accepts_all_gather(input_, dim):
            gathered = runtime.all_gather(input_, dim)
            return gathered if self.rank_in_group == dst else None
        self._count()
        return super().gather(input_, dst, dim)  # type: ignore[misc]

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """vLLM's own, counted."""
        self._count()
        return super().reduce_scatter(input_, dim)  # type: ignore[misc]

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """vLLM's own, counted."""
        self._count()
        return super().broadcast(tensor, src)  # type: ignore[misc]

    def all_gatherv(
        self, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """vLLM's own, counted as one, also for a list. Sparse attention gathers its prefill's rows so."""
        self._count()
        return super().all_gatherv(input_, dim, sizes)  # type: ignore[misc]

    # What else the base classes send between ranks, no configuration of a pair reaches, and nothing counts it:
    # - `send`, `recv` and tensor dictionaries join the stages of a pipeline, and there is one.
    # - `dispatch`, `combine`, their variants and `reduce_scatterv` serve experts under data or context parallelism. A
    #   pair with experts on both ranks adds up their outputs, which is an `all_reduce`.
    # - `batch_isend_irecv` serves engines that grow and shrink, which are data parallel.
    # - `custom_all_gather` and `custom_reduce_scatter` come with vLLM's own all-reduce for GPUs of one machine, which
    #   `--spark` turns off.
    # What vLLM does with torch.distributed itself does not come through here, so it cannot be counted here: objects and
    # barriers, `GroupCoordinator.broadcast`, operators of single models.

    def _count(self) -> None:
        if self.world_size > 1:
            count_fallback()


class _OutOfPlace(CpuCommunicator):  # type: ignore[misc]
    """vLLM's CPU communicator reduces in place, which compiled graphs must not see."""

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """The sum over the group's ranks as a fresh tensor."""
        return super().all_reduce(input_.clone())


class SparkCpuCommunicator(_Routing, _OutOfPlace):
    """CPU tensors: the runtime's CPU reduce, else the pair's process group."""

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        """False: vLLM's own shared-memory path would take both ranks to be on one host."""
        return False


class SparkCudaCommunicator(_Routing, CudaCommunicator):  # type: ignore[misc]
    """CUDA tensors: the runtime's kernels, else NCCL, which vLLM connects here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with connecting("NCCL", _NCCL_SECONDS):
            super().__init__(*args, **kwargs)
