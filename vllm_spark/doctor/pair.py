"""Checks that need both machines: equal versions, rails between them, and pings over each rail."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Iterator
from typing import NamedTuple

from vllm_spark.doctor.checks import MachineReport
from vllm_spark.doctor.finding import Finding, guarded
from vllm_spark.doctor.rails import ROCE_V2, Rail, active
from vllm_spark.doctor.rdma_mtu import rdma_mtu
from vllm_spark.doctor.system import System
from vllm_spark.errors import upper_first

_HEADERS = 28  # bytes of IPv4 and ICMP in front of a ping's own
_SMALL = 56
_ROUND_TRIP = re.compile(r"= [\d.]+/([\d.]+)/")


class RailPair(NamedTuple):
    """The two ends of a rail, with their addresses in one network."""

    mine: Rail
    theirs: Rail
    my_address: str
    their_address: str


def compare(system: System, mine: MachineReport, theirs: MachineReport) -> Iterator[Finding]:
    """Compares both reports, and sends pings over the rails. Never raises for what it finds."""
    yield from guarded("pair.versions", lambda: [_versions(mine, theirs)])
    if not active(mine.rails) or not active(theirs.rails):
        return
    yield from guarded("pair", lambda: _between(system, mine, theirs))


def _between(system: System, mine: MachineReport, theirs: MachineReport) -> Iterator[Finding]:
    """Findings about the rails."""
    try:
        pairs = rail_pairs(mine.rails, theirs.rails)
    except ImportError as error:
        yield _without_native_module(error)
        return
    yield _rails(mine, theirs, pairs)
    if pairs:
        yield _mtu(mine, theirs, pairs)
        yield _pings(system, pairs)


def distinguish_hosts(
    mine: MachineReport, theirs: MachineReport, my_address: str, their_address: str
) -> tuple[MachineReport, MachineReport]:
    """Both reports, with the addresses added to the hosts' names if two machines have the same name."""
    if mine.host != theirs.host or my_address == their_address:
        return mine, theirs
    return (
        dataclasses.replace(mine, host=f"{mine.host} ({my_address})"),
        dataclasses.replace(theirs, host=f"{theirs.host} ({their_address})"),
    )


def port_reached(host: str, endpoint: str) -> Finding:
    """The finding that the follower on `host` has connected to this machine's port."""
    return Finding("pair.port", "The follower reaches this machine", "ok", f"{endpoint}, from {host}")


def peer_missing(sentence: str, opening: str = "") -> Finding:
    """The finding that the other machine has not connected.

    Args:
        sentence: the reason.
        opening: the command that opens this machine's firewall; empty on loopback.
    """
    # The last part of the sentence is what to type, and where (see handshake/messages.py).
    found = re.fullmatch(r"(.*); (on the other machine|in another terminal) run: (.*)", sentence, re.DOTALL)
    problem, where, remedy = found.groups() if found else (sentence, "", "")
    return Finding(
        "pair.peer",
        "The other machine",
        "problem",
        "not connected",
        f"{upper_first(problem)}.",
        "\n".join(
            [f"{remedy}   # {where}"]
            + ([f"{opening}   # here, if vllm-spark join is waiting there"] if opening else [])
        )
        if remedy
        else "",
    )


def other_secret(sentence: str, copying: str) -> Finding:
    """The finding that the other machine has connected with another secret.

    Args:
        sentence: the reason; its last part is the command that starts the follower, and where.
        copying: the command that gives both machines the same secret.
    """
    problem, _, join = sentence.rpartition("; ")
    where, _, command = join.partition(" run: ")
    return Finding(
        "pair.peer",
        "The other machine",
        "problem",
        "has another secret",
        f"{upper_first(problem)}.",
        f"{copying}   # here\n{command}   # {where}, once both have the same secret: it ended",
    )


def rail_pairs(mine: list[Rail], theirs: list[Rail]) -> list[RailPair]:
    """The rails between the two machines, paired as the transport pairs them."""
    # Imported here: all other findings do not need the native module.
    from vllm_spark.collective import CollectiveError
    from vllm_spark.collective.rails import Port, PortAddress, pair

    def ports(rails: list[Rail]) -> list[Port]:
        return [
            Port(
                rail.device,
                rail.port,
                rdma_mtu(rail.mtu),
                tuple(
                    PortAddress(_gid(gid.address), _network(rail, gid.address))
                    for gid in rail.gids
                    if gid.kind == ROCE_V2
                ),
            )
            for rail in active(rails)
        ]

    try:
        ends = zip(pair(ports(mine), ports(theirs), 0), pair(ports(theirs), ports(mine), 1), strict=True)
    except CollectiveError:
        return []
    return [
        RailPair(_named(mine, here), _named(theirs, there), _text(here.gid), _text(there.gid)) for here, there in ends
    ]


def _versions(mine: MachineReport, theirs: MachineReport) -> Finding:
    title = "Same versions"
    if difference := mine.versions.difference(theirs.versions, mine.host, theirs.host):
        sentence, _, remedy = difference.partition("; ")
        return Finding(
            "pair.versions",
            title,
            "problem",
            sentence,
            "Both machines must have the same versions; the leader refuses a follower with others.",
            f"{upper_first(remedy)}: pip list | grep -E 'vllm|torch' shows what is installed.",
        )
    versions = mine.versions
    return Finding(
        "pair.versions",
        title,
        "ok",
        f"vllm_spark {versions.vllm_spark}, vllm {versions.vllm}, torch {versions.torch}, Python {versions.python}",
    )


def _without_native_module(error: ImportError) -> Finding:
    return Finding(
        "pair.rails",
        "Rails between the machines",
        "unknown",
        str(error),
        "The native module, which pairs the ports to rails, is not built or cannot be loaded.",
        "pip install .   # in the source tree; needs g++, and nvcc for GPUs",
    )


def _rails(mine: MachineReport, theirs: MachineReport, pairs: list[RailPair]) -> Finding:
    title = "Rails between the machines"
    value = ", ".join(
        f"{pair.mine.name} {pair.my_address} to {pair.theirs.name} {pair.their_address}" for pair in pairs
    )
    met = {pair.mine.name for pair in pairs}, {pair.theirs.name for pair in pairs}
    alone = [
        f"{rail.name} on {machine.host} ({', '.join(rail.addresses) or 'no address'})"
        for machine, names in zip((mine, theirs), met, strict=True)
        for rail in active(machine.rails)
        if rail.name not in names
    ]
    unsure = [pair for pair in pairs if pair.their_address.startswith("fe80:")]
    if not alone and not unsure:
        return Finding("pair.rails", title, "ok", value)
    return Finding(
        "pair.rails",
        title,
        "warning" if pairs else "problem",
        value or "none",
        "Two ports form a rail if their addresses are in one network. "
        + (f"The other machine has no port in the network of {'; '.join(alone)}." if alone else "")
        + (
            "These are paired by link-local addresses only, which do not show which ports a cable connects."
            if unsure and not alone
            else ""
        ),
        "Give both ends of a cable addresses in one network, a network of its own for each rail: 10.0.0.1/24 and "
        "10.0.0.2/24, 10.0.1.1/24 and 10.0.1.2/24.",
    )


def _mtu(mine: MachineReport, theirs: MachineReport, pairs: list[RailPair]) -> Finding:
    title = "Same MTU on both"
    different = [pair for pair in pairs if pair.mine.mtu != pair.theirs.mtu]
    value = ", ".join(
        f"{pair.mine.netdev} {pair.mine.mtu}, {pair.theirs.netdev} {pair.theirs.mtu} there"
        for pair in different or pairs
    )
    if not different:
        return Finding("pair.mtu", title, "ok", value)
    return Finding(
        "pair.mtu",
        title,
        "warning",
        value,
        "The smaller MTU limits both, and larger packets of other programs are dropped without an error.",
        "\n".join(
            f"sudo ip link set dev {rail.netdev} mtu {max(pair.mine.mtu, pair.theirs.mtu)}   # on {host}"
            for pair in different
            for rail, host in (
                [(pair.mine, mine.host)] if pair.mine.mtu < pair.theirs.mtu else [(pair.theirs, theirs.host)]
            )
        ),
    )


def _pings(system: System, pairs: list[RailPair]) -> Finding:
    """Sends a small packet, and one of the size of the MTU, over each rail."""
    title = "Each rail reaches the other end"
    answered, lost, cut = [], [], []
    for pair in pairs:
        small = _ping(system, pair, _SMALL)
        if small is None:
            return Finding(
                "pair.ping",
                title,
                "unknown",
                "",
                "The program ping is not installed here, so the rails could not be tested.",
                "sudo apt install iputils-ping",
            )
        if small == "":
            lost.append(pair)
        elif ":" not in pair.their_address and not _ping(system, pair, min(_mtus(pair)) - _HEADERS):
            cut.append(pair)
        else:
            answered.append(f"{pair.mine.netdev} to {pair.their_address} {small} ms")
    if not lost and not cut:
        return Finding("pair.ping", title, "ok", ", ".join(answered))
    return Finding(
        "pair.ping",
        title,
        "problem",
        ", ".join(
            answered
            + [f"{pair.mine.netdev} to {pair.their_address}: no answer" for pair in lost]
            + [f"{pair.mine.netdev} to {pair.their_address}: no packets of {min(_mtus(pair))} bytes" for pair in cut]
        ),
        " ".join(
            (
                ["No reply over these rails: the two ports are not on one cable, or a firewall drops the packets."]
                if lost
                else []
            )
            + (
                ["Large packets are lost: a switch between the machines has a smaller MTU than both ends."]
                if cut
                else []
            )
        ),
        "\n".join(
            [_ping_command(pair, _SMALL) for pair in lost]
            + [_ping_command(pair, min(_mtus(pair)) - _HEADERS) for pair in cut]
        ),
    )


def _ping(system: System, pair: RailPair, size: int) -> str | None:
    """The mean round trip in milliseconds; "" without a reply, None if ping is not installed."""
    _, *arguments = _ping_command(pair, size).split()
    answer = system.run("ping", *arguments)
    if answer is None:
        return None
    found = _ROUND_TRIP.search(answer[1])
    return found[1] if found and answer[0] == 0 else ""


def _ping_command(pair: RailPair, size: int) -> str:
    return f"ping -n -c 2 -i 0.2 -W 2 -M do -s {size} -I {pair.mine.netdev} {pair.their_address}"


def _mtus(pair: RailPair) -> tuple[int, int]:
    return pair.mine.mtu, pair.theirs.mtu


def _named(rails: list[Rail], end: object) -> Rail:
    return next(rail for rail in rails if (rail.device, rail.port) == (end.device, end.port))  # type: ignore[attr-defined]


def _gid(address: str) -> bytes:
    if ":" in address:
        return ipaddress.IPv6Address(address).packed
    return ipaddress.IPv6Address(f"::ffff:{address}").packed


def _text(gid: bytes) -> str:
    address = ipaddress.IPv6Address(gid)
    return str(address.ipv4_mapped or address)


def _network(rail: Rail, address: str) -> str:
    """The network of one of a rail's addresses, as the transport names it."""
    from vllm_spark.collective.rails import LINK_LOCAL

    if ":" in address and ipaddress.IPv6Address(address).is_link_local:
        return LINK_LOCAL
    for known in rail.addresses:
        if known.partition("/")[0] == address:
            return str(ipaddress.ip_interface(known).network)
    return address
