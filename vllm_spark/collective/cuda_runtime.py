"""One rank's end of a pair of ranks, on CUDA tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_spark import _native
from vllm_spark.collective.errors import UsageError
from vllm_spark.collective.options import KIB, RuntimeOptions
from vllm_spark.collective.runtime import Runtime, native_options

if TYPE_CHECKING:
    import torch

KERNELS = Path(_native.__file__).with_name("kernels.fatbin")
"""The compiled kernels; absent from a build without nvcc."""

_ALIGNMENT = 16  # bytes: a kernel's vector


class DeviceRuntime(Runtime):
    """Collectives on CUDA tensors with one peer: each is one kernel on the current stream, also in a CUDA graph.

    Kernels cannot raise. What makes one give up (a peer that does not come, calls something else, or aborts) is raised
    by the next call or by `check`, and everything computed since is worth nothing. All calls must be ordered among
    themselves, by one stream or by events; two at once fail.
    """

    device = "cuda"

    @classmethod
    def _make_native(cls, rank: int, options: RuntimeOptions, stripes: int) -> Any:
        import torch

        try:
            kernels = KERNELS.read_bytes()
        except FileNotFoundError:
            raise UsageError(
                "this vllm_spark was built without nvcc and has no kernels; "
                "install the CUDA toolkit, then vllm_spark anew"
            ) from None
        torch.zeros(1, device="cuda")  # makes the device's context current for this thread
        shape = _native.LaunchShape(**asdict(options.launch))
        return _native.DeviceRuntime(native_options(rank, options, stripes), shape, kernels)

    @classmethod
    def _fitting(cls, options: RuntimeOptions) -> RuntimeOptions:
        """With no more blocks than multiprocessors: all must run at once, and one fills a multiprocessor."""
        import torch

        multiprocessors = torch.cuda.get_device_properties().multi_processor_count
        blocks = min(options.launch.payload_blocks, multiprocessors)
        return replace(options, launch=replace(options.launch, payload_blocks=blocks))

    @classmethod
    def _best_packet_bytes(cls, options: RuntimeOptions) -> int:
        """From two GPUs (benchmarks/NOTES.md, entries 11, 13): packets double the bytes, a proxy reads them."""
        return 128 * KIB if not options.proxied else 8 * KIB

    def check(self) -> None:
        """Raises what made a kernel give up, if one has; results since then are worth nothing.

        Raises:
            CollectiveError: the peer failed, stopped, or called something else; the runtime is unusable then.
        """
        self._native.check()

    def _readable(self, tensor: torch.Tensor) -> torch.Tensor:
        source = tensor.contiguous()
        return source if source.data_ptr() % _ALIGNMENT == 0 else source.clone()

    def _run_all_reduce(self, source: torch.Tensor, out: torch.Tensor, dtype: _native.DType) -> None:
        if out.data_ptr() % _ALIGNMENT:
            fresh = out.new_empty(out.shape)
            self._run_all_reduce(source, fresh, dtype)
            out.copy_(fresh)
            return
        self._native.all_reduce(source.data_ptr(), out.data_ptr(), source.numel(), dtype, _stream())

    def _run_all_gather(self, source: torch.Tensor, out: torch.Tensor, outer: int) -> None:
        total = source.numel() * source.element_size()
        if total == 0:
            return
        if total // outer % _ALIGNMENT == 0:
            self._native.all_gather(source.data_ptr(), out.data_ptr(), outer, total // outer, _stream())
            return
        # Rows that end within a vector: gathered as one padded row, then put in order by torch.
        import torch

        padded = source.new_zeros(math.ceil(total / _ALIGNMENT) * _ALIGNMENT, dtype=torch.uint8)
        flat = source.reshape(-1).view(torch.uint8)
        padded[:total].copy_(flat)
        both = padded.new_empty((self.world_size, padded.numel()))
        self._native.all_gather(padded.data_ptr(), both.data_ptr(), 1, padded.numel(), _stream())
        rows = both[:, :total].reshape(self.world_size, outer, total // outer).transpose(0, 1)
        out.view(-1).view(torch.uint8).copy_(rows.reshape(-1))


def _stream() -> int:
    import torch

    return int(torch.cuda.current_stream().cuda_stream)
