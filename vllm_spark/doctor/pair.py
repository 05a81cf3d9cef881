"""What only both machines together show: equal versions, rails that meet, packets that get through."""

from __future__ import annotations

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
    """A rail's two ends, with the addresses that are in one network."""

    mine: Rail
    theirs: Rail
    my_address: str
    their_address: str


def compare(system: System, mine: MachineReport, theirs: MachineReport) -> Iterator[Finding]:
    """Looks at both; sends pings over the rails. Never raises for what it finds."""
    yield from guarded("pair.versions", lambda: [_versions(mine, theirs)])
    if not active(mine.rails) or not active(theirs.rails):
        return
    yield from guarded("pair", lambda: _between(system, mine, theirs))


def _between(system: System, mine: MachineReport, theirs: MachineReport) -> Iterator[Finding]:
    """What concerns the rails."""
    try:
        pairs = rail_pairs(mine.rails, theirs.rails)
    except ImportError as error:
        yield _without_native_module(error)
        return
    yield _rails(mine, theirs, pairs)
    if pairs:
        yield _mtu(mine, theirs, pairs)
        yield _pings(system, pairs)


def port_reached(host: str, endpoint: str) -> Finding:
    """That the follower on `host` came through to this machine's port, which is all that it needs."""
    return Finding("pair.port", "The follower reaches this machine", "ok", f"{endpoint}, from {host}")


def peer_missing(sentence: str, opening: str = "") -> Finding:
    """That the other machine was not seen.

    Args:
        sentence: why.
        opening: the command that lets it in; empty where no firewall is between.
    """
    problem, _, remedy = sentence.partition("; on the other machine run: ")
    return Finding(
        "pair.peer",
        "The other machine",
        "problem",
        "not seen",
        f"{upper_first(problem)}.",
        "\n".join(
            [f"{remedy}   # on the other machine"] + ([f"{opening}   # here, if it waits there"] if opening else [])
        )
        if remedy
        else "",
    )


def rail_pairs(mine: list[Rail], theirs: list[Rail]) -> list[RailPair]:
    """The rails between the two machines, as the transport forms them."""
    # Here, because all else is told of a machine whose native module is missing.
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
            "What one side sends the other runs, so both must be the same; the follower would be refused.",
            f"{upper_first(remedy)}: pip list | grep -E 'vllm|torch' shows what there is.",
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
        "Which ports form a rail is for the collectives to say, and their native module is not built or does not load.",
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
        + (f"Nothing on the other side meets {'; '.join(alone)}." if alone else "")
        + (
            "These meet by their link-local addresses only, which say nothing of where a cable leads."
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
        "The smaller one counts for both, and larger packets of other programs are lost without a word.",
        "\n".join(
            f"sudo ip link set dev {rail.netdev} mtu {max(pair.mine.mtu, pair.theirs.mtu)}   # on {host}"
            for pair in different
            for rail, host in (
                [(pair.mine, mine.host)] if pair.mine.mtu < pair.theirs.mtu else [(pair.theirs, theirs.host)]
            )
        ),
    )


def _pings(system: System, pairs: list[RailPair]) -> Finding:
    """A small packet and one that fills the MTU, over each rail."""
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
                "The program ping is not installed here, so no rail was tried.",
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
                ["No answer comes over these rails: the two ports are not on one cable, or a firewall drops it."]
                if lost
                else []
            )
            + (["Large packets are lost on the way: a switch between has a smaller MTU than both ends."] if cut else [])
        ),
        "\n".join(
            [_ping_command(pair, _SMALL) for pair in lost]
            + [_ping_command(pair, min(_mtus(pair)) - _HEADERS) for pair in cut]
        ),
    )


def _ping(system: System, pair: RailPair, size: int) -> str | None:
    """The mean round trip in milliseconds, "" if nothing came back, None without the program."""
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
    """The network of one of a rail's addresses, in the transport's words."""
    from vllm_spark.collective.rails import LINK_LOCAL

    if ":" in address and ipaddress.IPv6Address(address).is_link_local:
        return LINK_LOCAL
    for known in rail.addresses:
        if known.partition("/")[0] == address:
            return str(ipaddress.ip_interface(known).network)
    return address
