"""Limits of GPU models that kernels' parameters must keep."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Limits of one GPU model.

    Attributes:
        name: as vLLM writes it in file names: the driver's name with underscores.
        capability: compute capability, (12, 1) for sm_121.
        multiprocessors: of the whole GPU.
        shared_bytes: of shared memory that one block may have (opt-in limit).
        threads_per_multiprocessor: that can be resident.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    threads_per_multiprocessor: int


GB10 = Device(
    name="NVIDIA_GB10",
    capability=(12, 1),
    multiprocessors=48,
    shared_bytes=101_376,
    threads_per_multiprocessor=1_536,
)

DEVICES = {GB10.name: GB10}
"""Devices with known limits; tables of other devices are checked without them."""


def device_file_name(name: str) -> str:
    """A device's name as it stands in file names of tables, from the driver's ("NVIDIA GB10").

    H200s of every kind share vLLM's tables for the H200.
    """
    joined = "_".join(name.replace("/", " ").split())
    return "NVIDIA_H200" if "H200" in joined.split("_") else joined
