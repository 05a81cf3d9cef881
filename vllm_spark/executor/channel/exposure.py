"""Whether the link's network has more machines than the two, as far as this machine's kernel knows."""

from __future__ import annotations

from pathlib import Path

_COMPLETE = 0x2  # flag of an ARP entry whose machine answered
_NAMED = 3

EXPOSED = (
    "Other machines of that network can connect to the pair's port, where they do not get in without the secret, and "
    "can read and disturb the tensors that the ranks exchange, which are neither encrypted nor authenticated"
)
"""The risk of a network with other machines in it."""


def shared_network(interface: str, root: Path = Path("/")) -> str | None:
    """Why other machines may be in the network of `interface`: `has the default route`, say; None if unknown.

    Args:
        root: where /proc and /sys are mounted.
    """
    if interface in _with_default_route(root):
        return "has the default route"
    neighbours = _neighbours(interface, root)
    if len(neighbours) > 1:
        more = f" and {len(neighbours) - _NAMED} more" if len(neighbours) > _NAMED else ""
        return f"has {len(neighbours)} other machines in its network ({', '.join(neighbours[:_NAMED])}{more})"
    return None


def _with_default_route(root: Path) -> set[str]:
    """Interfaces of the default routes, IPv4 and IPv6."""
    four = [line.split() for line in _lines(root / "proc/net/route")[1:]]
    six = [line.split() for line in _lines(root / "proc/net/ipv6_route")]
    found = {fields[0] for fields in four if len(fields) > 7 and fields[1] == fields[7] == "00000000"}
    # The kernel always has one over lo that rejects: its gateway, like its network, is all zeros.
    found |= {f[9] for f in six if len(f) == 10 and f[1] == "00" and f[0] == "0" * 32 and f[9] != "lo"}
    return found


def _neighbours(interface: str, root: Path) -> list[str]:
    """IPv4 addresses of the machines that answered at `interface`."""
    entries = [line.split() for line in _lines(root / "proc/net/arp")[1:]]
    return sorted(
        fields[0]
        for fields in entries
        if len(fields) == 6 and fields[5] == interface and int(fields[2], 16) & _COMPLETE
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
