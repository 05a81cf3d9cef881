"""Checks of the network path between both machines, with packets that must arrive: full packets, TCP ports, clocks.

`doctor --peer` runs them while the other machine is connected: it sends packets there, and each machine listens for the
other at a TCP port that the kernel chose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, FiniteFloat

from vllm_spark.compat.versions import is_cpu_build
from vllm_spark.doctor.finding import Finding
from vllm_spark.doctor.system import System

_SMALL = 1500
_HEADERS = 28  # bytes of IPv4 and ICMP
_ECHO_SECONDS, _ATTEMPTS = 1.0, 3
_CONNECT_SECONDS = 3.0
_ECHO_REQUEST, _ECHO_REPLY = 8, 0
_MTU_DISCOVER, _PROBE = (
    10,
    3,
)  # IP_MTU_DISCOVER, IP_PMTUDISC_PROBE: no fragments, whatever path MTU is cached
_NOTED_SKEW, _WRONG_CLOCK = 1.0, 60.0  # seconds


@dataclasses.dataclass(frozen=True)
class PathProbe:
    """The follower's part of these checks.

    Attributes:
        time: seconds since 1970 by its clock, when it was sent.
        port: where it listens for the other machine; 0 if it cannot.
        reached: whether it reached the other machine's port; None if there was none.
    """

    time: FiniteFloat
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    reached: bool | None = None


@contextlib.contextmanager
def open_port(address: str) -> Iterator[int]:
    """Listens at a port of `address` that the kernel chose, and closes every connection at once.

    Yields:
        The port; 0 if it cannot listen there.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(_family(address), socket.SOCK_STREAM))
        try:
            listener.bind((address, 0))
            listener.listen(4)
        except OSError:
            yield 0
            return
        thread = threading.Thread(target=_close_all, args=(listener,), name="spark-doctor-port", daemon=True)
        thread.start()
        stack.callback(thread.join, _CONNECT_SECONDS)
        stack.callback(_shut_down, listener)
        yield int(listener.getsockname()[1])


def reaches(address: str, port: int) -> bool:
    """Whether a TCP connection to this port of the other machine can be opened within three seconds."""
    try:
        socket.create_connection((address, port), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def check_packets(system: System, interface: str | None, address: str, peer: str) -> Finding:
    """Whether packets of the interface's MTU reach the other machine and come back.

    Args:
        system: this machine.
        interface: over which it reaches the other one; None if it is not known.
        address: of this machine.
        peer: the other machine's address, of IPv4.
    """
    title = "Full packets between both"
    text = system.text(f"sys/class/net/{interface}/mtu") if interface else None
    mtu = int(text) if text and text.isdecimal() else _SMALL
    small = echo(address, peer, min(_SMALL, mtu) - _HEADERS)
    if small is None:
        return Finding(
            "pair.packets",
            title,
            "unknown",
            "",
            "This user may not send echo requests.",
            f"sudo ping -n -c 2 -M do -s {mtu - _HEADERS} {peer}",
        )
    if not small:
        return Finding(
            "pair.packets",
            title,
            "note",
            "no answer to echo requests",
            "A firewall on the other machine drops them, so it cannot be seen whether full packets arrive.",
            f"ping -n -c 2 -M do -s {mtu - _HEADERS} {peer}   # once it lets ICMP in",
        )
    if echo(address, peer, mtu - _HEADERS):
        return Finding("pair.packets", title, "ok", f"{mtu} bytes, {interface or address} to {peer} and back")
    return Finding(
        "pair.packets",
        title,
        "problem",
        f"{mtu} bytes of {interface or address} are lost on the way to {peer}, {_SMALL} arrive",
        "The other machine, or a switch between both, has a smaller MTU. Connections open, and hang with the first "
        "full packet; RDMA loses its large messages.",
        f"sudo ip link set dev {interface or 'INTERFACE'} mtu {_SMALL}   # on both; or raise the MTU on the whole way",
    )


def check_ports(host: str, there: bool, back: bool | None) -> Finding:
    """Whether both machines reach any port of each other, which NCCL needs.

    Args:
        host: the other machine.
        there: whether this one reached a port of the other.
        back: whether the other one reached a port of this one; None if it did not try.
    """
    title = "TCP ports both ways"
    closed = [f"from here to {host}"] * (not there) + [f"from {host} to here"] * (back is False)
    if not closed:
        return Finding("pair.ports", title, "ok", "ports that the kernel chose are open")
    where = "there" if not there and back is not False else "here" if there else "on both machines"
    return Finding(
        "pair.ports",
        title,
        "note" if is_cpu_build() else "problem",
        f"closed {' and '.join(closed)}",
        "A firewall drops connections to ports other than the leader's. vLLM's NCCL connects at ports that it chooses, "
        "both ways, while a pair with GPUs starts; the CPU build needs the leader's port alone.",
        f"sudo ufw allow in from OTHER-ADDRESS   # {where}, with the other machine's address on the cable",
    )


def check_clocks(host: str, ahead: float) -> Finding:
    """Whether both clocks agree.

    Args:
        host: the other machine.
        ahead: seconds by which its clock is ahead of this one's.
    """
    title = "Clocks of both"
    apart = f"{host} is {abs(ahead):,.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine"
    if abs(ahead) <= _NOTED_SKEW:
        return Finding("pair.clocks", title, "ok", f"less than {_NOTED_SKEW:g} s apart")
    return Finding(
        "pair.clocks",
        title,
        "warning" if abs(ahead) > _WRONG_CLOCK else "note",
        apart,
        "The pair does not depend on clocks, but lines of both logs cannot be put in order by their times"
        + (", and a clock that is far off makes downloads fail." if abs(ahead) > _WRONG_CLOCK else "."),
        "sudo timedatectl set-ntp true   # on both machines",
    )


def echo(address: str, peer: str, size: int) -> bool | None:
    """Whether an echo request that may not be fragmented is answered.

    Args:
        address: of this machine.
        peer: the other one's, of IPv4.
        size: bytes of the request, without the headers of IPv4 and ICMP.

    Returns:
        None if this user may not send any.
    """
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            probe = socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP)
        except OSError:
            continue
        with probe:
            probe.setsockopt(socket.IPPROTO_IP, _MTU_DISCOVER, _PROBE)
            probe.bind((address, 0))
            return any(_answered(probe, peer, size, number) for number in range(1, _ATTEMPTS + 1))
    return None


def _answered(probe: socket.socket, peer: str, size: int, number: int) -> bool:
    token = os.urandom(8)
    body = token + bytes(max(0, size - len(token)))
    try:
        probe.sendto(_request(number, body), (peer, 0))
    except OSError:  # larger than the interface's MTU, or no route
        return False
    end = time.monotonic() + _ECHO_SECONDS
    while (left := end - time.monotonic()) > 0:
        probe.settimeout(left)
        try:
            packet = probe.recv(1 << 16)
        except OSError:
            return False
        if probe.type == socket.SOCK_RAW:
            packet = packet[(packet[0] & 15) * 4 :]
        if len(packet) >= 8 + len(body) and packet[0] == _ECHO_REPLY and packet[8:].startswith(body):
            return True
    return False


def _request(number: int, body: bytes) -> bytes:
    """An ICMP echo request; for a datagram socket the kernel puts its own identifier and checksum in."""
    header = struct.pack("!BBHHH", _ECHO_REQUEST, 0, 0, os.getpid() & 0xFFFF, number)
    return header[:2] + struct.pack("!H", _checksum(header + body)) + header[4:] + body


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _close_all(listener: socket.socket) -> None:
    while True:
        try:
            listener.accept()[0].close()
        except OSError:  # it was shut down
            return


def _shut_down(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
