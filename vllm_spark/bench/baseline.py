"""The baseline: collectives of the library that vLLM uses without this project, called as vLLM calls them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Protocol

from vllm_spark.bench.ranks import Rank
from vllm_spark.ranks import WORLD_SIZE

if TYPE_CHECKING:
    import torch


class Baseline(Protocol):
    """A baseline; both ranks create it and make the same calls."""

    library: str
    """Name and version of the library."""

    def all_reduce(self, tensor: torch.Tensor) -> Any:
        """The sum of both ranks' tensors, or a sum of the same size."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Both ranks' tensors, along the first dimension."""

    def close(self) -> None:
        """Closes it; graphs with its calls must have been freed before."""


def gather_last(baseline: Baseline, tensor: torch.Tensor) -> torch.Tensor:
    """Both ranks' matrices along the last dimension: a gather along the first, and then the copy that vLLM makes."""
    rows, columns = tensor.shape
    return baseline.all_gather(tensor).view(WORLD_SIZE, rows, columns).movedim(0, 1).reshape(rows, -1)


def connect_baseline(rank: Rank, device: str) -> Baseline:
    """NCCL through nccl4py if it can be imported, else through torch; gloo on CPUs."""
    if device == "cpu":
        return TorchDistributed(rank, "gloo")
    try:
        import nccl.core  # noqa: F401  # needs cuda-bindings too, which comes with torch's CUDA build
    except ImportError:
        return TorchDistributed(rank, "nccl")
    return Nccl4py(rank)


class Nccl4py:
    """NCCL from one tensor into a fresh one on the current stream, as vLLM's own binding has it."""

    def __init__(self, rank: Rank) -> None:
        from nccl import core

        identity = bytes(core.get_unique_id()) if rank.index == 0 else b""
        theirs = rank.exchange(identity)
        self._communicator = core.Communicator.init(
            WORLD_SIZE, rank.index, core.UniqueId.from_bytes(identity or theirs)
        )
        self._sum = core.SUM
        versions = core.get_version()
        loaded = "of unknown version" if versions.libnccl is None else versions.libnccl.version
        self.library = f"NCCL {loaded} through nccl4py {versions.nccl4py}"

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum, as a fresh tensor."""
        out = tensor.new_empty(tensor.shape)
        self._communicator.allreduce(tensor, out, self._sum, stream=_stream())
        return out

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Both tensors, as a fresh one."""
        both = tensor.new_empty((WORLD_SIZE * tensor.shape[0], *tensor.shape[1:]))
        self._communicator.allgather(tensor, both, stream=_stream())
        return both

    def close(self) -> None:
        """Destroys the communicator."""
        self._communicator.destroy()


class TorchDistributed:
    """A backend of torch.distributed. It has no all-reduce from one tensor into another, so that is done in place."""

    def __init__(self, rank: Rank, backend: str) -> None:
        import torch
        import torch.distributed as dist

        # torch 2.13 has a new name for it, which 2.11 does not have.
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor")
        dist.init_process_group(backend, f"tcp://127.0.0.1:{rank.port}", rank=rank.index, world_size=WORLD_SIZE)
        # Zeros stay zeros, however often they are summed. A copy of the input for each call would be timed too.
        self._sums: dict[int, torch.Tensor] = {}
        version = ""
        if backend == "nccl":
            version = " " + ".".join(str(part) for part in torch.cuda.nccl.version())
        name = {"nccl": "NCCL", "gloo": "gloo"}[backend]
        self.library = f"{name}{version} through torch.distributed {torch.__version__}, all-reduces in place"

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sums the same number of zeros in place."""
        import torch
        import torch.distributed as dist

        if tensor.numel() not in self._sums:
            self._sums[tensor.numel()] = torch.zeros_like(tensor)
        dist.all_reduce(self._sums[tensor.numel()])

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Both tensors, as a fresh one."""
        import torch.distributed as dist

        both = tensor.new_empty((WORLD_SIZE * tensor.shape[0], *tensor.shape[1:]))
        dist.all_gather_into_tensor(both, tensor)
        return both

    def close(self) -> None:
        """Ends the process group."""
        import torch.distributed as dist

        dist.destroy_process_group()


def _stream() -> int:
    import torch

    return int(torch.cuda.current_stream().cuda_stream)
