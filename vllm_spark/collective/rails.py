"""The RDMA ports of a machine, and the rails that they form with the other machine's.

A rail is a port of each machine whose addresses are in the same network, so that one cable connects them. Both ranks
derive the same rails in the same order, from the same two lists.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from vllm_spark import _native
from vllm_spark.collective.errors import CollectiveError, UsageError
from vllm_spark.rail_choice import RailChoice
from vllm_spark.records import Bytes

MAX_RAILS = _native.MAX_RAILS
LINK_LOCAL = "link-local"


@dataclasses.dataclass(frozen=True)
class PortAddress:
    """One RoCE v2 address of a port."""

    gid: Bytes
    """16 bytes, as in a packet: an IPv6 address, or an IPv4 one mapped into it."""
    network: str
    """The network of the interface, such as `10.0.0.0/24`; `link-local` for addresses without one."""

    @property
    def text(self) -> str:
        """The address in its usual notation."""
        address = ipaddress.IPv6Address(self.gid)
        return str(address.ipv4_mapped or address)


@dataclasses.dataclass(frozen=True)
class Port:
    """A port that can be part of a rail."""

    device: str
    number: int
    mtu: int
    """Bytes of payload in one packet: 256 to 4096."""
    addresses: tuple[PortAddress, ...]

    @property
    def text(self) -> str:
        """Device and addresses, for messages."""
        return f"{self.device} ({', '.join(address.text for address in self.addresses)})"


class Rail(NamedTuple):
    """This machine's end of a rail, as the native module takes it."""

    device: str
    port: int
    gid: bytes
    mtu: int


def local_ports(choices: Sequence[str] = ()) -> list[Port]:
    """The active RoCE ports of this machine that have an address.

    Args:
        choices: the ports to use, in this order; empty for all.

    Raises:
        UsageError: a choice has an invalid syntax, or two of them are the same port.
        CollectiveError: a chosen port does not exist, is down or has no address; or libibverbs is missing.
    """
    found = [
        (device, number, active, mtu, gids)
        for device, number, active, ethernet, mtu, gids in _native.rdma_ports()
        if ethernet
    ]
    if not choices:
        ports = [_port(device, number, mtu, gids) for device, number, active, mtu, gids in found if active]
        return sorted((port for port in ports if port.addresses), key=lambda port: (port.device, port.number))
    try:
        named = [RailChoice.parse(text) for text in choices]
    except ValueError as error:
        raise UsageError(str(error)) from None
    chosen = [_chosen(choice, found) for choice in named]
    for index, port in enumerate(chosen):
        # Compared after the look-up: a port has several names.
        if any((port.device, port.number) == (other.device, other.number) for other in chosen[:index]):
            raise UsageError(
                f"the rails {', '.join(choices)} name port {port.number} of {port.device} twice; name each port once"
            )
    return chosen


def link_rate(rail: Rail) -> str:
    """The rate of the link at a rail's port, as `200 Gb/s`; empty if the kernel does not say."""
    try:
        text = Path(f"/sys/class/infiniband/{rail.device}/ports/{rail.port}/rate").read_text()
    except OSError:
        return ""
    return text.partition("(")[0].strip().replace("Gb/sec", "Gb/s")


def pair(mine: Sequence[Port], theirs: Sequence[Port], rank: int) -> list[Rail]:
    """This rank's ends of all rails between the two machines, in an order that is the same on both.

    Args:
        mine: the ports of this machine.
        theirs: those of the peer's.
        rank: this rank, 0 or 1.

    Raises:
        CollectiveError: no port here shares a network with one there; the message lists both.
    """
    first, second = (mine, theirs) if rank == 0 else (theirs, mine)
    rails: list[Rail] = []
    used: set[tuple[int, str, int]] = set()
    for network in sorted(_networks(first) & _networks(second), key=lambda text: (text == LINK_LOCAL, text)):
        if network == LINK_LOCAL and rails:
            break  # every cable has this network: used only without a better one
        ends = [
            [
                (port, address)
                for port, address in _in_network(ports, network)
                if (side, port.device, port.number) not in used
            ]
            for side, ports in enumerate((first, second))
        ]
        for pair_of_ends in zip(*ends, strict=False):
            used |= {(side, port.device, port.number) for side, (port, _) in enumerate(pair_of_ends)}
            port, address = pair_of_ends[rank]
            rails.append(Rail(port.device, port.number, address.gid, port.mtu))
    if not rails:
        raise CollectiveError(
            f"no RDMA port here is in one network with one of the peer: here {_list(mine)}, there {_list(theirs)}; "
            "give both ends of a cable addresses in one network, and check that their ports are active"
        )
    return rails[:MAX_RAILS]


def _networks(ports: Iterable[Port]) -> set[str]:
    return {address.network for port in ports for address in port.addresses}


def _in_network(ports: Iterable[Port], network: str) -> list[tuple[Port, PortAddress]]:
    """Each port once, with its first address there."""
    ends = []
    for port in ports:
        address = next((address for address in port.addresses if address.network == network), None)
        if address is not None:
            ends.append((port, address))
    return ends


def _list(ports: Sequence[Port]) -> str:
    return ", ".join(port.text for port in ports) or "none"


def _chosen(choice: RailChoice, found: Sequence[tuple[str, int, bool, int, list[tuple[int, bytes, int]]]]) -> Port:
    for device, number, active, mtu, gids in found:
        if device != choice.device or number != (choice.port or number):
            continue
        if choice.gid_index is not None:
            gids = [gid for gid in gids if gid[0] == choice.gid_index]
        port = _port(device, number, mtu, gids)
        if not active:
            raise CollectiveError(f"port {number} of {device} is down; check its cable, or choose other rails")
        if not port.addresses:
            at = "" if choice.gid_index is None else f" at index {choice.gid_index}"
            raise CollectiveError(
                f"port {number} of {device} has no RoCE v2 address{at}; give its network interface an address"
            )
        return port
    known = ", ".join(f"{device}:{number}" for device, number, *_ in found) or "none"
    raise CollectiveError(f"there is no RDMA port {choice.device}:{choice.port or 1}; this machine has {known}")


def _port(device: str, number: int, mtu: int, gids: Iterable[tuple[int, bytes, int]]) -> Port:
    addresses = [PortAddress(gid, _network(gid, interface)) for _, gid, interface in gids]
    # Mapped IPv4 addresses first: usually they are the configured ones.
    addresses.sort(key=lambda address: (address.network == LINK_LOCAL, ":" in address.text, address.text))
    return Port(device, number, mtu, tuple(addresses))


def _network(gid: bytes, interface: int) -> str:
    """The network that the interface with index `interface` has for this address."""
    address = ipaddress.IPv6Address(gid)
    # Only for IPv6: newer versions of Python apply `is_link_local` to a mapped IPv4 address, older ones do not, and
    # here 169.254/16 is a network like others.
    if address.ipv4_mapped is None and address.is_link_local:
        return LINK_LOCAL
    wanted = str(address.ipv4_mapped or address)
    name = ""
    with contextlib.suppress(OSError):
        name = socket.if_indextoname(interface)
    for entry in psutil.net_if_addrs().get(name, []):
        if entry.address.partition("%")[0] == wanted and entry.netmask:
            prefix = bin(int(ipaddress.ip_address(entry.netmask))).count("1")
            return str(ipaddress.ip_network(f"{wanted}/{prefix}", strict=False))
    return wanted  # a network of its own
