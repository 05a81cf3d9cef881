"""Which network an address is in, and through which interface another machine is reached, from the kernel's tables."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from typing import NamedTuple

from vllm_spark.doctor.system import System


class Route(NamedTuple):
    """One line of the IPv4 routing table."""

    interface: str
    network: ipaddress.IPv4Network
    connected: bool
    """True if the network is at the interface itself, and not behind a gateway."""


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
    """Name of the interface through which `peer` is reached; None if that is not known."""
    if ":" in peer:
        return peer.partition("%")[2] or None
    address = ipaddress.IPv4Address(peer)
    fitting = [route for route in routes(system) if address in route.network]
    return max(fitting, key=lambda route: route.network.prefixlen).interface if fitting else None


def address_with_prefix(system: System, interface: str, address: str) -> str:
    """`10.0.0.1/24`; with `/32` where no connected route says which network it is in."""
    lengths = [
        route.network.prefixlen
        for route in routes(system)
        if route.interface == interface and route.connected and ipaddress.IPv4Address(address) in route.network
    ]
    # The default route is no network of the interface's own.
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
    """The kernel prints the four bytes as one number of this machine's byte order."""
    return ipaddress.IPv4Address(struct.pack("=I", int(text, 16)))
