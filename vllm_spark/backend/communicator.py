"""vLLM's communicators, with collectives routed through this project's runtime.

A collective that the runtime does not support (dtype, size, group of ranks) uses vLLM's own path and is counted.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator

from vllm_spark.backend.logging import without_fallback_notice
from vllm_spark.backend.process_group import connecting
from vllm_spark.collective import Runtime, count_fallback, installed

logger = logging.getLogger("vllm_spark")

_NCCL_SECONDS = 120.0  # for both ranks to reach this point and to connect
_ROUTED_GROUPS = ("tp", "ep")


class _Routing:
    """Mixed into a vLLM communicator: uses the runtime where it can, else the base class."""

    unique_name: str
    world_size: int
    rank_in_group: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with without_fallback_notice() if installed() is not None else contextlib.nullcontext():
            super().__init__(*args, **kwargs)
        if (runtime := self._runtime) is not None:
            logger.info("Group %s: collectives use vllm_spark, %s.", self.unique_name, runtime.path)

    @property
    def _runtime(self) -> Runtime | None:
        """The runtime, if this group has its two ranks and is used by the model; else None."""
        runtime = installed()
        if runtime is None or self.world_size != runtime.world_size:
            return None
        return runtime if self.unique_name.partition(":")[0] in _ROUTED_GROUPS else None

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """The sum over both ranks as a new tensor; `input_` is not changed."""
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
        """vLLM's own, counted as one, also for a list. Sparse attention uses it for the rows of its prefill."""
        self._count()
        return super().all_gatherv(input_, dim, sizes)  # type: ignore[misc]

    # The base classes' other operations between ranks are not used by any configuration of a pair, and not counted:
    # - `send`, `recv` and tensor dictionaries join the stages of a pipeline, and there is one.
    # - `dispatch`, `combine`, their variants and `reduce_scatterv` serve experts under data or context parallelism. A
    #   pair with experts on both ranks adds up their outputs, which is an `all_reduce`.
    # - `batch_isend_irecv` serves engines that grow and shrink, which are data parallel.
    # - `custom_all_gather` and `custom_reduce_scatter` come with vLLM's own all-reduce for GPUs of one machine, which
    #   `--spark` turns off.
    # vLLM's direct uses of torch.distributed do not pass through here and cannot be counted: objects and barriers,
    # `GroupCoordinator.broadcast`, operators of some models.

    def _count(self) -> None:
        if self.world_size > 1:
            count_fallback()


class _OutOfPlace(CpuCommunicator):  # type: ignore[misc]
    """Makes the all-reduce of vLLM's CPU communicator, which works in place, safe for compiled graphs."""

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """The sum over the group's ranks as a new tensor."""
        return super().all_reduce(input_.clone())


class SparkCpuCommunicator(_Routing, _OutOfPlace):
    """CPU tensors: the runtime's CPU reduce, else the pair's process group."""

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        """False: vLLM's own shared-memory path assumes that both ranks are on one host."""
        return False


class SparkCudaCommunicator(_Routing, CudaCommunicator):  # type: ignore[misc]
    """CUDA tensors: the runtime's kernels, else NCCL, which vLLM connects here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with connecting("NCCL", _NCCL_SECONDS):
            super().__init__(*args, **kwargs)
