"""What only both machines together show: equal versions, rails that meet, packets that get through."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import NamedTuple

from vllm_spark.doctor.examination import Machine
from vllm_spark.doctor.finding import Finding, guarded
from vllm_spark.doctor.rails import ROCE_V2, Rail, active
from vllm_spark.doctor.rdma_mtu import rdma_mtu
from vllm_spark.doctor.system import System
from vllm_spark.errors import upper_first

_HEADERS = 28  # bytes of IPv4 and ICMP in front of a ping's own
_SMALL = 56
_ROUND_TRIP = re.compile(r"= [\d.]+/([\d.]+)/")


class Meeting(NamedTuple):
    """A rail's two ends, with the addresses that are in one network."""

    mine: Rail
    theirs: Rail
    my_address: str
    their_address: str


def compare(system: System, mine: Machine, theirs: Machine) -> Iterator[Finding]:
    """Looks at both; sends pings over the rails. Never raises for what it finds."""
    yield from guarded("pair.versions", lambda: [_versions(mine, theirs)])
    if not active(mine.rails) or not active(theirs.rails):
        return
    yield from guarded("pair", lambda: _between(system, mine, theirs))


def _between(system: System, mine: Machine, theirs: Machine) -> Iterator[Finding]:
    """What concerns the rails."""
    try:
        meetings = meet(mine.rails, theirs.rails)
    except ImportError as error:
        yield _unformed(error)
        return
    yield _rails(mine, theirs, meetings)
    if meetings:
        yield _mtu(mine, theirs, meetings)
        yield _pings(system, meetings)


def reached(host: str, endpoint: str) -> Finding:
    """That the follower on `host` came through to this machine's port, which is all that it needs."""
    return Finding("pair.port", "The follower reaches this machine", "ok", f"{endpoint}, from {host}")


def nobody(sentence: str, opening: str = "") -> Finding:
    """That the other machine was not seen.

    Args:
        sentence: why.
        opening: the command that lets it in; empty where no firewall is between.
    """
    # The last part of the sentence is what to type, and where (see handshake/messages.py).
    found = re.fullmatch(r"(.*); (on the other machine|in another terminal) run: (.*)", sentence, re.DOTALL)
    problem, where, remedy = found.groups() if found else (sentence, "", "")
    return Finding(
        "pair.peer",
        "The other machine",
        "problem",
        "not seen",
        f"{upper_first(problem)}.",
        "\n".join([f"{remedy}   # {where}"] + ([f"{opening}   # here, if it waits there"] if opening else []))
        if remedy
        else "",
    )


def meet(mine: list[Rail], theirs: list[Rail]) -> list[Meeting]:
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
        Meeting(_named(mine, here), _named(theirs, there), _text(here.gid), _text(there.gid)) for here, there in ends
    ]


def _versions(mine: Machine, theirs: Machine) -> Finding:
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


def _unformed(error: ImportError) -> Finding:
    return Finding(
        "pair.rails",
        "Rails between the machines",
        "unknown",
        str(error),
        "Which ports form a rail is for the collectives to say, and their native module is not built or does not load.",
        "pip install .   # in the source tree; needs g++, and nvcc for GPUs",
    )


def _rails(mine: Machine, theirs: Machine, meetings: list[Meeting]) -> Finding:
    title = "Rails between the machines"
    value = ", ".join(
        f"{meeting.mine.name} {meeting.my_address} to {meeting.theirs.name} {meeting.their_address}"
        for meeting in meetings
    )
    met = {meeting.mine.name for meeting in meetings}, {meeting.theirs.name for meeting in meetings}
    alone = [
        f"{rail.name} on {machine.host} ({', '.join(rail.addresses) or 'no address'})"
        for machine, names in zip((mine, theirs), met, strict=True)
        for rail in active(machine.rails)
        if rail.name not in names
    ]
    unsure = [meeting for meeting in meetings if meeting.their_address.startswith("fe80:")]
    if not alone and not unsure:
        return Finding("pair.rails", title, "ok", value)
    return Finding(
        "pair.rails",
        title,
        "warning" if meetings else "problem",
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


def _mtu(mine: Machine, theirs: Machine, meetings: list[Meeting]) -> Finding:
    title = "Same MTU on both"
    different = [meeting for meeting in meetings if meeting.mine.mtu != meeting.theirs.mtu]
    value = ", ".join(
        f"{meeting.mine.netdev} {meeting.mine.mtu}, {meeting.theirs.netdev} {meeting.theirs.mtu} there"
        for meeting in different or meetings
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
            f"sudo ip link set dev {rail.netdev} mtu {max(meeting.mine.mtu, meeting.theirs.mtu)}   # on {host}"
            for meeting in different
            for rail, host in (
                [(meeting.mine, mine.host)]
                if meeting.mine.mtu < meeting.theirs.mtu
                else [(meeting.theirs, theirs.host)]
            )
        ),
    )


def _pings(system: System, meetings: list[Meeting]) -> Finding:
    """A small packet and one that fills the MTU, over each rail."""
    title = "Each rail reaches the other end"
    answered, lost, cut = [], [], []
    for meeting in meetings:
        small = _ping(system, meeting, _SMALL)
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
            lost.append(meeting)
        elif ":" not in meeting.their_address and not _ping(system, meeting, min(_mtus(meeting)) - _HEADERS):
            cut.append(meeting)
        else:
            answered.append(f"{meeting.mine.netdev} to {meeting.their_address} {small} ms")
    if not lost and not cut:
        return Finding("pair.ping", title, "ok", ", ".join(answered))
    return Finding(
        "pair.ping",
        title,
        "problem",
        ", ".join(
            answered
            + [f"{meeting.mine.netdev} to {meeting.their_address}: no answer" for meeting in lost]
            + [
                f"{meeting.mine.netdev} to {meeting.their_address}: no packets of {min(_mtus(meeting))} bytes"
                for meeting in cut
            ]
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
            [_ping_command(meeting, _SMALL) for meeting in lost]
            + [_ping_command(meeting, min(_mtus(meeting)) - _HEADERS) for meeting in cut]
        ),
    )


def _ping(system: System, meeting: Meeting, size: int) -> str | None:
    """The mean round trip in milliseconds, "" if nothing came back, None without the program."""
    _, *arguments = _ping_command(meeting, size).split()
    answer = system.run("ping", *arguments)
    if answer is None:
        return None
    found = _ROUND_TRIP.search(answer[1])
    return found[1] if found and answer[0] == 0 else ""


def _ping_command(meeting: Meeting, size: int) -> str:
    return f"ping -n -c 2 -i 0.2 -W 2 -M do -s {size} -I {meeting.mine.netdev} {meeting.their_address}"


def _mtus(meeting: Meeting) -> tuple[int, int]:
    return meeting.mine.mtu, meeting.theirs.mtu


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
