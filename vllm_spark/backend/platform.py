"""vLLM's platforms with this project's communicators.

`activate` changes the class of the platform object that vLLM already uses, only in the processes that serve with
`--spark`. A platform plugin would be resolved while vLLM is imported, before `--spark` is known.
"""

from __future__ import annotations

import vllm.envs
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import Platform

from vllm_spark.backend.process_group import BACKEND, pair_is_up
from vllm_spark.errors import ConfigurationError

ONE_MACHINE_ALL_REDUCES = (
    "VLLM_ALLREDUCE_USE_SYMM_MEM",
    "VLLM_ALLREDUCE_USE_FLASHINFER",
    "VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC",
)
"""Settings of vLLM, some of them on by default, for all-reduces in memory that GPUs of one machine share. A pair never
uses them, and their buffers cannot be connected: torch's symmetric memory takes the store from the group, and ends the
process by SIGSEGV where the group is a `PairGroup`, which cannot have one (seen with torch 2.11 on two H200)."""


class SparkCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """CPU: collectives through `SparkCpuCommunicator`, process groups through `PairGroup`."""

    @property
    def dist_backend(self) -> str:
        """The kind of process group that vLLM makes for its ranks."""
        return BACKEND if pair_is_up() else str(super().dist_backend)

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """The communicator class that vLLM gives to each group of ranks."""
        return "vllm_spark.backend.communicator.SparkCpuCommunicator"

    @classmethod
    def use_custom_op_collectives(cls) -> bool:
        """True: compiled graphs must see collectives as opaque operators, not trace into them."""
        return True


def activate() -> None:
    """Makes vLLM's platform of this process return this project's communicators.

    Raises:
        ConfigurationError: this project does not support the platform.
    """
    kind = type(current_platform)
    if kind.__name__.startswith("Spark"):
        return
    current_platform.__class__ = _extended(kind)


def compute_capability() -> tuple[int, int] | None:
    """The compute capability of vLLM's GPU, (12, 1) for a GB10; None without a GPU."""
    found = current_platform.get_device_capability()
    return None if found is None else (found.major, found.minor)


def turn_off_one_machine_all_reduces() -> None:
    """Turns off `ONE_MACHINE_ALL_REDUCES` in this process, whatever the environment says.

    An attribute of `vllm.envs` takes precedence over the variable, and is not sent to other processes.
    """
    for name in ONE_MACHINE_ALL_REDUCES:
        if name in vllm.envs.environment_variables:
            setattr(vllm.envs, name, False)


def _extended(kind: type[Platform]) -> type[Platform]:
    if kind is CpuPlatform:
        return SparkCpuPlatform
    if current_platform.is_cuda():
        return _cuda_platform(kind)
    raise ConfigurationError(
        f"--spark works with vLLM for CUDA or CPU, and this vLLM runs on {kind.__name__}; install one of those"
    )


def _cuda_platform(kind: type[Platform]) -> type[Platform]:
    """Extends vLLM's CUDA platform; at import vLLM decides whether that is the NVML-based one."""
    turn_off_one_machine_all_reduces()

    class SparkCudaPlatform(kind):  # type: ignore[misc]
        """CUDA: collectives through `SparkCudaCommunicator`."""

        @classmethod
        def get_device_communicator_cls(cls) -> str:
            """The communicator class that vLLM gives to each group of ranks."""
            return "vllm_spark.backend.communicator.SparkCudaCommunicator"

    return SparkCudaPlatform
