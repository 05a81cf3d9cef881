"""Checks of RDMA devices: presence, state of the ports, access rights, RoCE v2 addresses; and their pinned memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress

from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor.finding import Finding
from vllm_spark.doctor.rails import ROCE_V2, Rail, active
from vllm_spark.doctor.system import System
from vllm_spark.errors import ConfigurationError

LIBRARY = "libibverbs.so.1"
_PACKET_BYTES = 16 << 10
"""The runtime's own upper limit of LL packets through a proxy."""


def missing() -> Finding:
    """The finding that there is no RDMA device."""
    return Finding(
        "rdma.devices",
        "RDMA devices",
        "problem",
        "none",
        "/sys/class/infiniband is empty, and tensors are exchanged by RDMA. On a GB10 the ports "
        "belong to a ConnectX-7, with the drivers mlx5_core and mlx5_ib.",
        "sudo modprobe mlx5_ib\nlspci | grep -i mellanox   # no output: the machine does not detect its network card",
    )


def check_devices(rails: list[Rail]) -> Iterator[Finding]:
    """Findings about the devices and the state of their ports."""
    up = active(rails)
    yield Finding("rdma.devices", "RDMA devices", "ok", ", ".join(rail.name for rail in rails))
    value = ", ".join(f"{rail.name} {rail.state}" + (f" {rail.rate}" if rail.active else "") for rail in rails)
    if up:
        yield _ethernet(up) or Finding("rdma.port", "Port state", "ok", value)
        return
    netdev = next((rail.netdev for rail in rails if rail.netdev), "INTERFACE")
    yield Finding(
        "rdma.port",
        "Port state",
        "problem",
        ", ".join(f"{rail.name} {rail.state} ({rail.physical_state})" for rail in rails),
        "No port is ACTIVE, so nothing can be sent. Disabled: the interface is down here. Polling: the port finds no "
        "other end of its cable.",
        f"sudo ip link set dev {netdev} up\n"
        f"ethtool {netdev} | grep -E 'Speed|Link detected'\n"
        "Push the cable in on both machines until it clicks, and check that the other machine is on.",
    )


def _ethernet(up: list[Rail]) -> Finding | None:
    others = [rail for rail in up if rail.link_layer not in ("Ethernet", "")]
    if len(others) < len(up):
        return None
    return Finding(
        "rdma.port",
        "Port state",
        "problem",
        ", ".join(f"{rail.name} is {rail.link_layer}" for rail in others),
        "The pair uses RoCE, which is RDMA over Ethernet; these ports use another link layer.",
        f"sudo mlxconfig -d {others[0].pci or 'PCI-ADDRESS'} set LINK_TYPE_P1=2   # 2 is Ethernet; then restart",
    )


def check_access(system: System, rails: list[Rail]) -> Finding:
    """Whether a program of this user can open the devices."""
    title = "Access to the devices"
    files = [
        (rail.device, f"dev/infiniband/{name}") for rail in active(rails) for name in _verbs_names(system, rail.device)
    ]
    refused = [f"/{path}" for _, path in files if not system.accessible(path)]
    if refused or not files:
        return Finding(
            "rdma.access",
            title,
            "problem",
            f"no access to {', '.join(refused)}" if refused else "no device file",
            "A program opens an RDMA device by its file in /dev/infiniband, which must be passed into a container.",
            "sudo modprobe ib_uverbs\n"
            "sudo chmod 0666 /dev/infiniband/uverbs*   # until the next boot; permanently: rdma-core's udev rules\n"
            "docker run --device /dev/infiniband ...   # in a container",
        )
    if system.live and not _loads(LIBRARY):
        return Finding(
            "rdma.access",
            title,
            "problem",
            f"{LIBRARY} is missing",
            "Programs use RDMA devices through this library and its provider for each kind of device.",
            "sudo apt install libibverbs1 ibverbs-providers",
        )
    return Finding("rdma.access", title, "ok", ", ".join(f"/{path}" for _, path in files))


def check_gids(rails: list[Rail]) -> Finding:
    """Whether the active ports have RoCE v2 addresses."""
    title = "RoCE v2 address (GID)"
    up = active(rails)
    without = [rail for rail in up if not any(gid.kind == ROCE_V2 for gid in rail.gids)]
    value = ", ".join(f"{rail.name} {_best_gid(rail)}" for rail in up)
    if not without:
        return Finding("rdma.gid", title, "ok", value)
    old = any(rail.gids for rail in without)
    return Finding(
        "rdma.gid",
        title,
        "problem" if len(without) == len(up) else "warning",
        value,
        "The pair uses RoCE v2, whose packets are UDP packets and need an IP address. "
        + (
            "These ports have RoCE v1 addresses only."
            if old
            else "A port has one once its interface is up and has an IP address."
        )
        + (" The other ports are used." if len(without) < len(up) else ""),
        "\n".join(
            f"sudo devlink dev param set pci/{rail.pci} name enable_roce value true cmode driverinit && "
            f"sudo devlink dev reload pci/{rail.pci}"
            if rail.pci
            else f"sudo ip link set dev {rail.netdev or 'INTERFACE'} up"
            for rail in without
        ),
    )


def _best_gid(rail: Rail) -> str:
    """The GID that the transport selects: RoCE v2, IPv4 addresses before link-local ones."""
    fitting = [gid for gid in rail.gids if gid.kind == ROCE_V2]
    if not fitting:
        kinds = sorted({gid.kind or "of unknown kind" for gid in rail.gids})
        return f"none ({', '.join(kinds)} only)" if kinds else "none"
    best = min(fitting, key=lambda gid: (gid.address.startswith("fe80"), ":" in gid.address, gid.index))
    return f"index {best.index} ({best.address})"


def _verbs_names(system: System, device: str) -> list[str]:
    """The names of a device's files in /dev/infiniband."""
    return [
        path.split("/")[-2] for path in system.glob("sys/class/infiniband_verbs/*/ibdev") if system.text(path) == device
    ]


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def pinned_bytes(config: SparkConfig, rails: int) -> int:
    """Bytes that are locked for the NICs with these settings: the whole region, once for each rail.

    Raises:
        ImportError: the native module is missing.
    """
    from vllm_spark._native import region_bytes

    return rails * region_bytes(
        slot_bytes=config.slot_kib << 10, packet_bytes=_packet_bytes(config), depth=config.depth
    )


def _packet_bytes(config: SparkConfig) -> int:
    """The largest message that is sent as LL packets over RDMA."""
    found = None if config.packet_kib is None else config.packet_kib << 10
    # With an unreadable or invalid table: serving reports that.
    with suppress(OSError, ConfigurationError):
        from vllm_spark.collective.launch_table import load_launch_table

        found = load_launch_table(config.launch_table).packet_bytes(config.packet_kib, config.slot_kib, "proxied")
    return min(_PACKET_BYTES, config.slot_kib << 10) if found is None else found
