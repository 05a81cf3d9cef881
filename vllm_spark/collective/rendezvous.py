"""The rendezvous of two ranks: they compare their settings, exchange addresses, and wait until both have connected.

Each step (`agree`, `swap_addresses` or `swap_ports` and `swap_offers`, `both_ready`) sends one JSON message by a
callable of the caller's, `exchange(mine) -> theirs`: three on each side for loopback, four for verbs.
`machine_identity` tells whether two processes can share memory.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vllm_spark._native import REGION_VERSION
from vllm_spark.collective.errors import AgreementError, CollectiveError
from vllm_spark.collective.rails import Port
from vllm_spark.ranks import RANKS
from vllm_spark.records import Bytes, RecordError, from_json, to_json

Exchange = Callable[[bytes], bytes]

PROTOCOL_VERSION = 3

_Message = TypeVar("_Message")


@dataclasses.dataclass(frozen=True)
class Terms:
    """A rank's identity and the settings that must be equal."""

    rank: int
    world_size: int
    description: str
    agreement: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Address:
    """The address of a rank's region on this machine."""

    boot: str
    process: int
    descriptor: int
    nonce: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Ports:
    """The RDMA ports of a rank's machine, or why there are none."""

    ports: tuple[Port, ...] = ()
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class LinkOffer:
    """The data to connect to a rank's rails, or why there are none."""

    offer: Bytes = b""
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Ready:
    """The result of connecting: empty, or why it failed."""

    problem: str = ""


def agree(exchange: Exchange, mine: Terms) -> Terms:
    """Compares `mine` with the peer's terms and returns the peer's.

    Raises:
        AgreementError: on both ranks, naming the first difference and both values.
    """
    own = {"protocol": str(PROTOCOL_VERSION), "region": str(REGION_VERSION), **mine.agreement}
    mine = dataclasses.replace(mine, agreement=own)
    theirs = _swap(exchange, mine, Terms)
    if mine.world_size != theirs.world_size:
        raise AgreementError(_difference("world size", mine.rank, mine.world_size, theirs.rank, theirs.world_size))
    if {mine.rank, theirs.rank} != set(RANKS):
        raise AgreementError(
            f"this process is rank {mine.rank}, and the peer is rank {theirs.rank}; "
            "one must be rank 0, the other rank 1"
        )
    for name in sorted(mine.agreement.keys() | theirs.agreement.keys()):
        here, there = mine.agreement.get(name, "absent"), theirs.agreement.get(name, "absent")
        if here != there:
            raise AgreementError(_difference(name, mine.rank, here, theirs.rank, there))
    return theirs


def swap_addresses(exchange: Exchange, mine: Address) -> Address:
    """Sends this rank's address and returns the peer's.

    Raises:
        CollectiveError: the peer is on another machine.
    """
    theirs = _swap(exchange, mine, Address)
    if mine.boot != theirs.boot:
        raise CollectiveError(
            "the peer runs on another machine, and the loopback transport connects two processes of one machine; "
            "start both on one, or use the transport verbs"
        )
    return theirs


def swap_ports(exchange: Exchange, mine: Ports) -> tuple[Port, ...]:
    """Sends the ports of this machine and returns those of the peer's.

    Raises:
        CollectiveError: one of them has none.
    """
    theirs = _swap(exchange, mine, Ports)
    _raise_problem(mine.problem, theirs.problem, "has no ports to use")
    return theirs.ports


def swap_offers(exchange: Exchange, mine: LinkOffer) -> bytes:
    """Sends this rank's rails and returns the peer's.

    Raises:
        CollectiveError: one of them could not open any.
    """
    theirs = _swap(exchange, mine, LinkOffer)
    _raise_problem(mine.problem, theirs.problem, "could not open its rails")
    return theirs.offer


def both_ready(exchange: Exchange, problem: str) -> None:
    """Waits until both ranks have connected.

    Raises:
        CollectiveError: one of them could not.
    """
    theirs = _swap(exchange, Ready(problem), Ready)
    _raise_problem(problem, theirs.problem, "could not connect")


def machine_identity() -> str:
    """The kernel's random boot id and the PID namespace: equal for processes that can open each other's memory."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.readlink('/proc/self/ns/pid')}"


def _raise_problem(mine: str, theirs: str, what: str) -> None:
    if mine or theirs:
        raise CollectiveError(mine or f"the peer {what}: {theirs}")


def _swap(exchange: Exchange, mine: Any, kind: type[_Message]) -> _Message:
    answer = exchange(to_json(mine))
    try:
        return from_json(answer, kind)
    except RecordError as error:
        raise CollectiveError(
            f"the peer's {kind.__name__} message could not be read ({error}); "
            "run the same version of vllm-spark on both sides"
        ) from None


def _difference(name: str, rank: int, here: object, peer_rank: int, there: object) -> str:
    return f"the ranks differ in {name}: {here} on rank {rank}, {there} on rank {peer_rank}; set the same on both"
