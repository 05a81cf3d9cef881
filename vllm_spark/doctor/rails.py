"""The ports of RDMA devices with their interfaces, addresses and routes, read from the kernel's files.

An active port can be a rail of the pair.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from vllm_spark.doctor.system import System
from vllm_spark.executor.channel.rdma_ports import DEVICES, RdmaPort, rdma_ports

_PCI_ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.([0-7])")
ROCE_V2 = "RoCE v2"


@dataclasses.dataclass(frozen=True)
class Gid:
    """One entry of a port's address table."""

    index: int
    address: str
    """The IP address in it."""
    kind: str
    """`RoCE v2`, `IB/RoCE v1`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rail:
    """One port of one RDMA device. Unknown values are empty, or 0."""

    device: str
    port: int
    state: str
    physical_state: str
    rate: str
    link_layer: str
    netdev: str
    pci: str
    connector: str
    """Name of the physical port, which several PCIe functions share."""
    pcie_width: int
    mtu: int
    """Of the network interface, in bytes."""
    addresses: list[str]
    """IP addresses of the network interface, with the length of their network's prefix: `10.0.0.1/24`."""
    gids: list[Gid]

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.device if self.port == 1 else f"{self.device} port {self.port}"

    @property
    def active(self) -> bool:
        """True if it can carry traffic."""
        return self.state == "ACTIVE"

    @property
    def networks(self) -> list[ipaddress.IPv4Interface]:
        """Its IPv4 addresses, each with its network."""
        return [ipaddress.IPv4Interface(address) for address in self.addresses if ":" not in address]


def find_rails(system: System) -> list[Rail]:
    """Every port of every RDMA device, by name."""
    return [_rail(system, port) for port in rdma_ports(system.root)]


def active(rails: list[Rail]) -> list[Rail]:
    """The rails that can carry traffic."""
    return [rail for rail in rails if rail.active]


def _rail(system: System, port: RdmaPort) -> Rail:
    device, folder = f"{DEVICES}/{port.device}/device", port.folder
    # A port without an address has no interface of its own in the kernel's files.
    netdev = port.interface or next(iter(system.entries(f"{device}/net")), "")
    gids = _gids(system, folder)
    pci = system.target(device) or ""
    function = _PCI_ADDRESS.fullmatch(pci)
    connector = system.text(f"sys/class/net/{netdev}/phys_port_name") if netdev else None
    return Rail(
        device=port.device,
        port=port.number,
        state=_words(system.text(f"{folder}/state")),
        physical_state=_words(system.text(f"{folder}/phys_state")),
        rate=system.text(f"{folder}/rate") or "",
        link_layer=system.text(f"{folder}/link_layer") or "",
        netdev=netdev,
        pci=pci if function else "",
        connector=connector or (f"p{function[1]}" if function else f"{port.device}/{port.number}"),
        pcie_width=_number(system.text(f"{device}/current_link_width")),
        mtu=_number(system.text(f"sys/class/net/{netdev}/mtu")) if netdev else 0,
        addresses=_addresses(system, netdev, gids),
        gids=gids,
    )


def _gids(system: System, folder: str) -> list[Gid]:
    gids = []
    for name in sorted(filter(str.isdecimal, system.entries(f"{folder}/gids")), key=int):
        text = system.text(f"{folder}/gids/{name}")
        try:
            gid = ipaddress.IPv6Address(text or "::")
        except ValueError:
            continue
        if int(gid) == 0:
            continue
        kind = system.text(f"{folder}/gid_attrs/types/{name}") or ""
        gids.append(Gid(int(name), str(gid.ipv4_mapped or gid), kind))
    return gids


def _addresses(system: System, netdev: str, gids: list[Gid]) -> list[str]:
    """The interface's addresses. No file lists IPv4 addresses, but each of an RDMA device's interface is a GID."""
    ipv4 = dict.fromkeys(gid.address for gid in gids if ":" not in gid.address)
    return [address_with_prefix(system, netdev, address) for address in ipv4] + ipv6_addresses(system, netdev)


def _words(text: str | None) -> str:
    """`4: ACTIVE` -> `ACTIVE`."""
    return (text or "unknown").rpartition(":")[2].strip()


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


class Route(NamedTuple):
    """One line of the IPv4 routing table."""

    interface: str
    network: ipaddress.IPv4Network
    connected: bool
    """True if the network is directly connected, and not behind a gateway."""


def routes(system: System) -> Iterator[Route]:
    """The main IPv4 routing table."""
    for line in (system.text("proc/net/route") or "").splitlines()[1:]:
        fields = line.split()
        try:
            target, gateway, mask = (_address(fields[column]) for column in (1, 2, 7))
            yield Route(fields[0], ipaddress.IPv4Network(f"{target}/{mask}"), int(gateway) == 0)
        except (IndexError, ValueError, struct.error):
            continue


def interface_towards(system: System, peer: str) -> str | None:
    """Name of the interface that the routing table gives for `peer`; None if unknown.

    Reads the table's file, and does not ask the kernel for a route: `system` may be a copy of another machine's files.
    """
    if ":" in peer:
        return peer.partition("%")[2] or None
    address = ipaddress.IPv4Address(peer)
    fitting = [route for route in routes(system) if address in route.network]
    return max(fitting, key=lambda route: route.network.prefixlen).interface if fitting else None


def address_with_prefix(system: System, interface: str, address: str) -> str:
    """`10.0.0.1/24`; with `/32` if no connected route has its network."""
    lengths = [
        route.network.prefixlen
        for route in routes(system)
        if route.interface == interface and route.connected and ipaddress.IPv4Address(address) in route.network
    ]
    # Without the default route, which is not a network of the interface.
    return f"{address}/{max(filter(None, lengths), default=32)}"


def ipv6_addresses(system: System, interface: str) -> list[str]:
    """The interface's IPv6 addresses, with prefix length."""
    found = []
    for line in (system.text("proc/net/if_inet6") or "").splitlines():
        fields = line.split()
        if len(fields) == 6 and fields[5] == interface:
            found.append(f"{ipaddress.IPv6Address(bytes.fromhex(fields[0]))}/{int(fields[2], 16)}")
    return found


def _address(text: str) -> ipaddress.IPv4Address:
    """An address from the kernel's hexadecimal number in native byte order."""
    return ipaddress.IPv4Address(struct.pack("=I", int(text, 16)))
