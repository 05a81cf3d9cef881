"""Checks of the network: MTU, PCIe functions and addresses of the rails, route to the peer, firewall and port."""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterator

from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor.finding import Finding
from vllm_spark.doctor.rails import Rail, active, interface_towards
from vllm_spark.doctor.rdma_mtu import BEST, MTU_COSTS, rdma_mtu
from vllm_spark.doctor.system import System
from vllm_spark.errors import ConfigurationError, upper_first
from vllm_spark.executor.channel.addresses import format_endpoint
from vllm_spark.executor.channel.exposure import EXPOSED, shared_network
from vllm_spark.executor.channel.secret import load_secret, same_secret_command, secret_source
from vllm_spark.executor.handshake.check import check_leader
from vllm_spark.executor.handshake.client import listener_command

_PCIE_LANES = 4
"""Of each of the port's PCIe functions on a GB10."""

_COMMANDS = {
    "ufw": "sudo ufw allow in{interface} to any port {port} proto tcp",
    "firewalld": "sudo firewall-cmd --permanent --add-port={port}/tcp && sudo firewall-cmd --reload",
}


def check_network(system: System, rails: list[Rail], peer: str | None) -> Iterator[Finding]:
    """Findings about the interfaces of the active ports."""
    up = active(rails)
    yield _mtu(up)
    yield from _functions(rails)
    yield _addresses(up)
    if any(_own(rail) for rail in up):
        yield _networks(up)
        yield _way_to_peer(system, up, peer)


def check_shared(system: System, interfaces: list[str]) -> Finding:
    """Whether the networks of the link contain other machines than the two.

    Args:
        interfaces: those over which the pair talks.
    """
    title = "A network of the pair's own"
    shared = {name: reason for name in interfaces if (reason := shared_network(name, system.root))}
    if not shared:
        return Finding("link.shared", title, "ok", ", ".join(interfaces))
    return Finding(
        "link.shared",
        title,
        "warning",
        "; ".join(f"{name} {reason}" for name, reason in shared.items()),
        f"{EXPOSED}.",
        "Join the two machines with a cable, give both ends addresses in a network of its own, such as 10.0.0.1/24 and "
        "10.0.0.2/24, and name those: --spark-address on the first machine, --leader on the second.",
    )


def _mtu(up: list[Rail]) -> Finding:
    title = "MTU of the interfaces"
    known = [rail for rail in up if rail.mtu]
    small = [rail for rail in known if rdma_mtu(rail.mtu) < BEST]
    value = ", ".join(f"{rail.netdev} {rail.mtu}" for rail in known)
    if not known:
        return Finding("link.mtu", title, "unknown", "", "The active ports belong to no network interface.")
    if not small:
        return Finding("link.mtu", title, "ok", value)
    return Finding(
        "link.mtu",
        title,
        "warning",
        value,
        f"{MTU_COSTS} Packets of 4096 bytes need an MTU of 4200 or more, and 9000 is usual.",
        "\n".join(
            f"sudo ip link set dev {rail.netdev} mtu 9000   # until the next boot; on both machines" for rail in small
        )
        + "\n"
        + "\n".join(f"sudo nmcli device modify {rail.netdev} ethernet.mtu 9000" for rail in small)
        + "\nFor good: ethernet.mtu 9000 in the connection's profile (nmcli connection modify), or mtu in netplan.",
    )


def _functions(rails: list[Rail]) -> Iterator[Finding]:
    """A GB10 reaches each of its two connectors through two PCIe functions, and half of the bandwidth through one."""
    title = "Both PCIe functions of the port"
    connectors: dict[str, list[Rail]] = defaultdict(list)
    for rail in rails:
        connectors[rail.connector].append(rail)
    used = {name: ends for name, ends in connectors.items() if any(rail.active for rail in ends)}
    idle = [rail for ends in used.values() for rail in ends if not rail.active]
    value = ", ".join(rail.name for ends in used.values() for rail in ends if rail.active)
    if idle:
        yield Finding(
            "link.rails",
            title,
            "warning",
            f"{value} active, {', '.join(rail.name for rail in idle)} not",
            "Each function has four PCIe lanes, half of what the cable carries: 92.6 and 97.3 Gb/s, 189.9 together "
            "(ib_write_bw, NVIDIA/dgx-spark-playbooks, connect-two-sparks). And with two rails one may fail.",
            "\n".join(f"sudo ip link set dev {rail.netdev or 'INTERFACE'} up" for rail in idle),
        )
    elif all(len(ends) == 1 for ends in used.values()):
        yield Finding(
            "link.rails",
            title,
            "not applicable",
            f"{value}, one function each",
            "On a GB10 there would be two for each port.",
        )
    else:
        yield Finding("link.rails", title, "ok", value)
    widths = {rail.name: rail.pcie_width for rail in active(rails) if rail.pcie_width}
    narrow = [name for name, width in widths.items() if width < _PCIE_LANES]
    lanes = ", ".join(f"{name} x{width}" for name, width in widths.items())
    if narrow:
        yield Finding(
            "link.pcie",
            "PCIe lanes of the rails",
            "warning",
            lanes,
            f"{', '.join(narrow)} should have {_PCIE_LANES} lanes; with fewer the rail is slower than the other one. "
            "Firmware of before April 2026 was reported to give the second function two lanes only.",
            "sudo fwupdmgr refresh && sudo fwupdmgr update   # then switch the machine off and on",
        )
    elif widths:
        yield Finding("link.pcie", "PCIe lanes of the rails", "ok", lanes)


def _addresses(up: list[Rail]) -> Finding:
    title = "IP address on the link"
    without = [rail for rail in up if not _own(rail)]
    value = ", ".join(f"{rail.netdev or rail.name} {', '.join(_own(rail)) or 'none'}" for rail in up)
    if not without:
        return Finding("link.address", title, "ok", value)
    return Finding(
        "link.address",
        title,
        "problem" if len(without) == len(up) else "warning",
        value,
        "The machines find each other by IP address, and a rail is used if both its ends have one in the same network. "
        + (
            "No rail here has one."
            if len(without) == len(up)
            else f"Without one, {', '.join(rail.name for rail in without)} is left out, which halves the bandwidth."
        ),
        "\n".join(
            f"sudo nmcli connection add type ethernet con-name {rail.netdev or 'INTERFACE'} "
            f"ifname {rail.netdev or 'INTERFACE'} ipv4.method manual ipv4.addresses {address} "
            "ipv6.method link-local ethernet.mtu 9000"
            for rail, address in zip(without, _free_addresses(up), strict=False)
        )
        + "\nOn the other machine the same with 2 as the last number of the address.",
    )


def _networks(up: list[Rail]) -> Finding:
    title = "Each rail in a network of its own"
    ends: dict[ipaddress.IPv4Network, list[Rail]] = defaultdict(list)
    for rail in up:
        for network in {address.network for address in rail.networks}:
            ends[network].append(rail)
    if sum(bool(rail.networks) for rail in up) < 2:
        return Finding("link.networks", title, "not applicable", "", "Fewer than two rails have an address.")
    shared = {network: there for network, there in ends.items() if len(there) > 1}
    if not shared:
        return Finding("link.networks", title, "ok", ", ".join(map(str, ends)))
    network, there = next(iter(shared.items()))
    return Finding(
        "link.networks",
        title,
        "warning",
        f"{', '.join(rail.netdev for rail in there)} all in {network}",
        "Linux sends all packets for one network through one interface, and each interface answers ARP requests for "
        "the other's addresses: the traffic of both rails may use one of them.",
        "\n".join(
            f"sudo nmcli device modify {rail.netdev} ipv4.method manual ipv4.addresses 10.0.{index}.1/24"
            for index, rail in enumerate(there)
        )
        + "\nOn the other machine the same with 2 as the last number of the address.",
    )


def _way_to_peer(system: System, up: list[Rail], peer: str | None) -> Finding:
    title = "Route to the other machine"
    if peer is None:
        return Finding(
            "link.peer",
            title,
            "not applicable",
            "",
            "Its address is not known.",
            "vllm-spark doctor --peer   # while vllm-spark join runs on the other machine",
        )
    interface = interface_towards(system, peer)
    through = next((rail for rail in up if rail.netdev == interface), None)
    if through is not None:
        return Finding("link.peer", title, "ok", f"{peer} through {interface} ({through.name})")
    return Finding(
        "link.peer",
        title,
        "problem",
        f"{peer} through {interface}" if interface else f"no route to {peer}",
        "No rail is in the network of that address: an interface here is in another network than the peer's, or the "
        "address is that of the office network. Here the rails have "
        + (", ".join(address for rail in up for address in _own(rail)) or "no address")
        + ".",
        "Give both ends of the cable addresses in one network, such as 10.0.0.1/24 and 10.0.0.2/24, and name those: "
        "--spark-address on the first machine, --leader on the second.",
    )


def _free_addresses(up: list[Rail]) -> Iterator[str]:
    """10.0.0.1/24, 10.0.1.1/24 and so on, without networks that a rail already has."""
    taken = [address.network for rail in up for address in rail.networks]
    for number in range(256):
        address = ipaddress.IPv4Interface(f"10.0.{number}.1/24")
        if not any(address.network.overlaps(network) for network in taken):
            yield str(address)


def _own(rail: Rail) -> list[str]:
    """The configured addresses: all but automatic IPv6 link-local ones."""
    return [
        address for address in rail.addresses if not ipaddress.ip_interface(address).ip.is_link_local or "." in address
    ]


def check_firewall(system: System, port: int, interface: str | None) -> Finding:
    """Which of the usual firewalls is active here: on the leader it must let the follower's connections in."""
    title = "Firewall"
    active = _active(system)
    if active is None:
        return Finding("link.firewall", title, "ok", "neither ufw nor firewalld is active")
    return Finding(
        "link.firewall",
        title,
        "note",
        f"{active} is active",
        f"The leader listens at TCP port {port}, which its firewall must open for the follower. The CPU build of vLLM "
        "needs no other port; on GPUs NCCL uses random ports, so allow all traffic between "
        "the two addresses of the cable.",
        f"{opening(system, port, interface)}   # on the leader",
    )


def opening(system: System, port: int, interface: str | None) -> str:
    """The command that opens the port: for the active firewall, else for the most common one."""
    return _COMMANDS[_active(system) or "ufw"].format(port=port, interface=f" on {interface}" if interface else "")


def check_reach(leader: str, config: SparkConfig, port: int) -> Finding:
    """Whether the leader's port can be reached from here, and what listens there; a refused connection is enough.

    Args:
        leader: its address.
        config: where this machine's secret is.
        port: the leader's.
    """
    title = "The leader's port"
    endpoint = format_endpoint(leader, port)
    try:
        secret = load_secret(config, leader)
    except ConfigurationError:  # the finding about the secret says why
        secret = None
    answer = check_leader(leader, port, secret, secret_source(config, leader))
    if answer.outcome == "unreachable":
        return Finding(
            "link.port",
            title,
            "problem",
            answer.sentence,
            "A port without a listener refuses a connection at once. There was no reply: a firewall there "
            "drops or rejects connections to this port, the machine is off, or the address is wrong.",
            "\n".join(f"{command}   # there, with {name}" for name, command in _named(port)),
        )
    value, _, remedy = answer.sentence.partition("; ")
    if answer.outcome in ("nothing listens", "leader"):
        return Finding("link.port", title, "ok", answer.sentence)
    if answer.outcome == "refusal":
        explanation = "The leader would refuse this machine's vllm-spark join now."
        return Finding(
            "link.port", title, "problem" if answer.is_final else "note", value, explanation, upper_first(remedy)
        )
    if answer.outcome == "no secret":
        return Finding("link.port", title, "unknown", value, f"{upper_first(remedy)}.")
    if answer.outcome == "other secret":
        explanation = "The leader rejects this machine's vllm-spark join, which then ends."
        copying = same_secret_command(config, leader, to_host=False)
        return Finding("link.port", title, "problem", value, explanation, f"{copying}   # here")
    return Finding(
        "link.port",
        title,
        "problem",
        value,
        "No leader answers at that port, so vllm-spark join would wait there. Another program has the port, something "
        "forwards it, or the leader hangs.",
        f"{listener_command(endpoint)}   # there: which program has the port",
    )


def _named(port: int) -> list[tuple[str, str]]:
    return [(name, command.format(port=port, interface="")) for name, command in _COMMANDS.items()]


def _active(system: System) -> str | None:
    """The active firewall, which any user can find out; reading its rules needs root."""
    if "ENABLED=yes" in (system.text("etc/ufw/ufw.conf") or "").split():
        return "ufw"
    return "firewalld" if system.run("firewall-cmd", "--state") == (0, "running") else None
