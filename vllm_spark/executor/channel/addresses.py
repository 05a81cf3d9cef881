"""Addresses of the link between the machines: which ones the ranks use, and where the leader listens."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from vllm_spark.config.settings import SparkConfig, flag_name, kind_of_many, split_endpoint
from vllm_spark.errors import ConfigurationError
from vllm_spark.executor.channel.rdma_ports import rdma_ports
from vllm_spark.ranks import LEADER_RANK, WORLD_SIZE
from vllm_spark.variables import variable_name

LOOPBACK = "127.0.0.1"

_BACKLOG = 64  # connections that may wait to be accepted


def leader_address(config: SparkConfig) -> str:
    """The address on which the leader listens: the one that is set, a launcher's, the RDMA link's, or loopback.

    Raises:
        ConfigurationError: the address is not this machine's, or there are several RDMA interfaces to choose from.
    """
    if config.address is not None:
        if interface_of(config.address) is None:
            raise ConfigurationError(
                f"{flag_name('address')} {config.address} is not an address of this machine, which has "
                f"{', '.join(sorted(_own_addresses()))}"
            )
        return config.address
    if address := _launchers_address():
        return address
    return _only(_rdma_addresses(), flag_name("address")) or LOOPBACK


def resolve_master(master: str) -> list[str]:
    """The IP addresses that a launcher's MASTER_ADDR stands for: an address, or a name to look up.

    Raises:
        ConfigurationError: the name is not known here, or stands for no single machine.
    """
    try:
        found = socket.getaddrinfo(master, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a host name"
        raise ConfigurationError(
            f"MASTER_ADDR={master} cannot be resolved here ({reason}); set it to the IP address of the leader's machine"
        ) from None
    # IPv4 first: it is what most links have.
    addresses = dict.fromkeys(str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0] != socket.AF_INET))
    for address in addresses:
        if kind := kind_of_many(ipaddress.ip_address(address)):
            what = f"is {kind}" if address == master else f"stands for {address}, {kind}"
            raise ConfigurationError(f"MASTER_ADDR={master} {what}; set it to the IP address of the leader's machine")
    return list(addresses)


def leader_endpoint(config: SparkConfig) -> tuple[str, int]:
    """Address and port at which a follower finds its leader.

    Raises:
        ConfigurationError: this machine has an RDMA link, so the leader is elsewhere and must be named.
    """
    if config.leader is not None:
        host, port = split_endpoint(config.leader)
        return host, config.port if port is None else port
    if addresses := _rdma_addresses():
        raise ConfigurationError(
            f"this machine has the link address {addresses[0]}, but the leader's is not known; "
            f"give it with {flag_name('leader')} ADDRESS or {variable_name('leader')}"
        )
    return LOOPBACK, config.port


def listen(address: str, port: int) -> socket.socket:
    """A TCP socket that listens on `address`:`port` and on nothing else.

    Raises:
        ConfigurationError: the port is in use or not allowed, or the address is not one of this machine.
    """
    with _explained(address, port):
        listening = _bound(address, port)
        try:
            listening.listen(_BACKLOG)  # with SO_REUSEADDR two sockets can bind one port; the second one fails here
        except OSError:
            listening.close()
            raise
    return listening


def check_free(address: str, port: int) -> None:
    """Checks that `listen` would work now, without accepting connections.

    Raises:
        ConfigurationError: as `listen`.
    """
    with _explained(address, port):
        _bound(address, port).close()


def check_ports(config: SparkConfig) -> None:
    """Checks early that this machine has an RDMA port if the settings need one.

    Raises:
        ConfigurationError: `--spark-transport verbs` or `--spark-rails`, and no such port.
    """
    if config.transport == "loopback" or (config.transport == "auto" and config.rails is None):
        return
    from vllm_spark.collective import CollectiveError, local_ports

    flag = f"{flag_name('rails')} {config.rails}" if config.rails else "--spark-transport verbs"
    try:
        ports = local_ports(split_rails(config.rails))
    except CollectiveError as error:
        raise ConfigurationError(f"{flag}: {error}") from None
    if not ports:
        raise ConfigurationError(
            f"{flag}: this machine has no active RDMA port with an address; vllm-spark doctor says what is missing, "
            "and with both ranks on this machine --spark-transport loopback needs none"
        )


def split_rails(rails: str | None) -> tuple[str, ...]:
    """The ports that `--spark-rails` names."""
    return tuple(rail.strip() for rail in rails.split(",")) if rails else ()


def format_endpoint(host: str, port: int) -> str:
    """`10.0.0.1:29650`, `[fe80::1]:29650`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_name() -> str:
    """This machine's name, for messages."""
    return socket.gethostname()


def is_loopback(address: str) -> bool:
    """True for addresses that only processes of this machine can connect to."""
    return ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str | None:
    """Name of the network interface that holds `address`; None if it is not this machine's."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    # Every address of 127.0.0.0/8 is this machine's, though the interface lists only one.
    if is_loopback(address) and ":" not in address:
        return next((n for n, es in psutil.net_if_addrs().items() if any(e.address == LOOPBACK for e in es)), None)
    return None


def source_address(peer: str) -> str | None:
    """The address of this machine from which it connects to the address `peer`; None without a route."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))  # sends nothing
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _launchers_address() -> str | None:
    """The address at which rank 1 of a launcher connects to this process, rank 0; None without torchrun's variables."""
    rank, world_size, master = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    if (rank, world_size) != (str(LEADER_RANK), str(WORLD_SIZE)) or not master:
        return None
    mine = [address for address in resolve_master(master) if interface_of(address) is not None]
    if not mine:
        raise ConfigurationError(
            f"MASTER_ADDR={master} is not an address of this machine, which is RANK 0 and has "
            f"{', '.join(sorted(_own_addresses()))}; set MASTER_ADDR to one of them, or give one with "
            f"{flag_name('address')}"
        )
    # Many machines resolve their own name to 127.0.1.1, and other machines resolve it to another address.
    return min(mine, key=is_loopback)


def _bound(address: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Otherwise the port cannot be used while connections of a former process are in TIME_WAIT.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    return bound


@contextmanager
def _explained(address: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = (
            "end what listens there (a leader or a doctor that runs already?), or choose another port with "
            f"{flag_name('port')}"
        )
        if error.errno in (errno.EADDRNOTAVAIL, errno.EINVAL):
            remedy = f"give this machine's address on the link with {flag_name('address')}"
        raise ConfigurationError(
            f"cannot listen on {format_endpoint(address, port)} ({error.strerror}); {remedy}"
        ) from None


def _own_addresses() -> set[str]:
    families = (socket.AF_INET, socket.AF_INET6)
    return {e.address for es in psutil.net_if_addrs().values() for e in es if e.family in families}


def _rdma_addresses() -> list[str]:
    """IPv4 addresses of the network interfaces that belong to RDMA devices."""
    interfaces = {port.interface for port in rdma_ports()}
    addresses = psutil.net_if_addrs()
    return sorted(e.address for name in interfaces for e in addresses.get(name, []) if e.family == socket.AF_INET)


def _only(addresses: list[str], flag: str) -> str | None:
    if len(addresses) > 1:
        raise ConfigurationError(
            f"this machine has several link addresses ({', '.join(addresses)}); choose one with {flag}"
        )
    return addresses[0] if addresses else None
