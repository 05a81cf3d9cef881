"""Whether the follower gets through to the leader's port, and what opens it."""

from __future__ import annotations

import socket

from vllm_spark.doctor.finding import Finding
from vllm_spark.doctor.system import System
from vllm_spark.executor.endpoint import format_endpoint

_CONNECT_SECONDS = 5.0
_COMMANDS = {
    "ufw": "sudo ufw allow in{interface} to any port {port} proto tcp",
    "firewalld": "sudo firewall-cmd --permanent --add-port={port}/tcp && sudo firewall-cmd --reload",
}


def check_firewall(system: System, port: int, interface: str | None) -> Finding:
    """Which of the usual firewalls is active here: it must let followers in if this machine leads."""
    title = "Firewall"
    active = _active(system)
    if active is None:
        return Finding("link.firewall", title, "ok", "neither ufw nor firewalld is active")
    return Finding(
        "link.firewall",
        title,
        "note",
        f"{active} is active",
        f"The machine that leads listens at TCP port {port}, and its firewall must let the follower in. With vLLM for "
        "the CPU nothing else is needed; on GPUs NCCL opens ports of its own choice, so let everything through between "
        "the two addresses of the cable.",
        f"{opening(system, port, interface)}   # on the machine that leads",
    )


def opening(system: System, port: int, interface: str | None) -> str:
    """The command that lets followers in: for the firewall that is active here, else for the most usual one."""
    return _COMMANDS[_active(system) or "ufw"].format(port=port, interface=f" on {interface}" if interface else "")


def check_reach(leader: str, port: int) -> Finding:
    """Whether a connection from here to the leader's port gets an answer; nobody need listen there."""
    title = "The leader's port"
    endpoint = format_endpoint(leader, port)
    try:
        socket.create_connection((leader, port), timeout=_CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return Finding("link.port", title, "ok", f"{endpoint} can be reached, nobody listens there now")
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()
        return Finding(
            "link.port",
            title,
            "problem",
            f"{endpoint}: {reason}",
            "Where nobody listens, a machine refuses a connection at once. Here nothing came back: a firewall there "
            "drops or rejects what comes to this port, the machine is off, or the address is another one's.",
            "\n".join(f"{command}   # there, with {name}" for name, command in _named(port)),
        )
    return Finding("link.port", title, "ok", f"{endpoint} answers")


def _named(port: int) -> list[tuple[str, str]]:
    return [(name, command.format(port=port, interface="")) for name, command in _COMMANDS.items()]


def _active(system: System) -> str | None:
    """The firewall that is on: both tell everybody, while the rules themselves are for root to read."""
    if "ENABLED=yes" in (system.text("etc/ufw/ufw.conf") or "").split():
        return "ufw"
    return "firewalld" if system.run("firewall-cmd", "--state") == (0, "running") else None
