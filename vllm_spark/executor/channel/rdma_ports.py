"""Lists the ports of RDMA devices from the kernel's files, which needs neither libibverbs nor a right to use a device.

The runtime asks libibverbs (`vllm_spark.collective.rails`), which has what a connection needs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

DEVICES = "sys/class/infiniband"
"""The folder of all RDMA devices, below the root folder."""


class RdmaPort(NamedTuple):
    """One port of an RDMA device.

    Attributes:
        device: name of the device, such as `rocep1s0f0`.
        number: from 1.
        interface: name of the network interface; empty for a port without an address, or not of Ethernet.
    """

    device: str
    number: int
    interface: str

    @property
    def folder(self) -> str:
        """The port's folder, below the root folder."""
        return f"{DEVICES}/{self.device}/ports/{self.number}"


def rdma_ports(root: Path = Path("/")) -> list[RdmaPort]:
    """Every port of every RDMA device, in the order of their names.

    Args:
        root: `/`, or a folder with a copy of another machine's files.
    """
    return [
        RdmaPort(device, int(number), _interface(root / DEVICES / device / "ports" / number))
        for device in _entries(root / DEVICES)
        for number in _entries(root / DEVICES / device / "ports")
        if number.isdecimal()
    ]


def _interface(port: Path) -> str:
    folder = port / "gid_attrs" / "ndevs"
    for index in _entries(folder):
        try:
            if name := (folder / index).read_text(errors="replace").strip():
                return name
        except OSError:  # reading the entry of an unused GID fails
            continue
    return ""


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
