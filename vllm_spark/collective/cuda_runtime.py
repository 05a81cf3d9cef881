"""The runtime of one rank for CUDA tensors."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_spark import _native
from vllm_spark.collective.errors import CollectiveError, UsageError
from vllm_spark.collective.options import KIB, PROXIED_SHAPE, LaunchShape, RuntimeOptions
from vllm_spark.collective.rails import Rail
from vllm_spark.collective.rendezvous import LinkOffer
from vllm_spark.collective.runtime import Runtime, native_options, open_link
from vllm_spark.errors import upper_first

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("vllm_spark")

KERNELS = Path(_native.__file__).with_name("kernels.fatbin")
"""The compiled kernels; absent from a build without nvcc."""

_ALIGNMENT = 16  # bytes: a kernel's vector


def read_kernels() -> bytes:
    """The compiled kernels; a UsageError if this build has none."""
    try:
        return KERNELS.read_bytes()
    except FileNotFoundError:
        raise UsageError(
            "this vllm_spark was built without nvcc and has no kernels; "
            "install the CUDA toolkit, then reinstall vllm_spark"
        ) from None


def default_shape(options: RuntimeOptions) -> LaunchShape:
    """The launch shape for a GPU on which none was measured, by the path of these options."""
    return PROXIED_SHAPE if options.proxied else LaunchShape()


@cache
def _warn_of_kernel_time_limit() -> None:
    """Once in a process."""
    logger.warning(
        "A display uses this GPU, so its driver ends kernels that run for some seconds. A kernel that waits so long "
        "for the other machine, as while its cable is out, ends this process (CUDA error 702, launch timeout). Serve "
        "without a display: sudo systemctl isolate multi-user.target"
    )


class DeviceRuntime(Runtime):
    """Collectives on CUDA tensors with one peer: each is one kernel on the current stream, also in a CUDA graph.

    Kernels cannot raise. If one fails (the peer does not call the collective in time, calls another one, or aborts),
    the next call or `check` raises the error, and all results since then are invalid. The calls must be ordered, by one
    stream or by events; two at once fail.
    """

    device = "cuda"

    @classmethod
    def _open_rails(cls, rank: int, options: RuntimeOptions, rails: list[Rail]) -> tuple[Any, LinkOffer]:
        """As the base class, with memory of the GPU's driver, or, where a NIC cannot pin that, with shared memory.

        The NIC pins shared memory before the GPU's driver does (docs/decisions.md).
        """
        native = cls._make_native(rank, options, len(rails), driver_memory=True)
        try:
            return native, open_link(native, options, rails)
        except CollectiveError as error:
            logger.warning(
                "%s. That was memory of the GPU's driver; memory that the NIC pins first is tried now.",
                upper_first(str(error)),
            )
        del native  # its memory is not needed beside the other
        return super()._open_rails(rank, options, rails)

    @classmethod
    def _make_native(cls, rank: int, options: RuntimeOptions, stripes: int, *, driver_memory: bool = False) -> Any:
        import torch

        kernels = read_kernels()
        torch.zeros(1, device="cuda")  # makes the device's context current for this thread
        if _native.DeviceRuntime.limits_kernel_time:
            _warn_of_kernel_time_limit()
        shape = _native.LaunchShape(**asdict(options.launch or default_shape(options)))
        return _native.DeviceRuntime(native_options(rank, options, stripes), shape, kernels, driver_memory)

    @classmethod
    def _limited_to_device(cls, options: RuntimeOptions) -> RuntimeOptions:
        """With at most one block per multiprocessor: all blocks must run at once, and one occupies a multiprocessor."""
        import torch

        shape = options.launch or default_shape(options)
        multiprocessors = torch.cuda.get_device_properties().multi_processor_count
        return replace(options, launch=replace(shape, payload_blocks=min(shape.payload_blocks, multiprocessors)))

    @classmethod
    def _default_packet_bytes(cls, options: RuntimeOptions) -> int:
        """Measured on two GPUs (benchmarks/NOTES.md, entries 11, 17): LL sends a third more, which a proxy reads."""
        return 128 * KIB if not options.proxied else 16 * KIB

    def check(self) -> None:
        """Raises the error of a failed kernel, if there is one; results since then are invalid.

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
        # Rows whose size is not a multiple of a vector: gathered as one padded row, then reordered by torch.
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
