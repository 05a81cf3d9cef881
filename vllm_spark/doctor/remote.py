"""The remote check: `doctor --peer` listens at the leader's port, and the follower that connects sends its report.

Both messages are JSON on an authenticated connection; nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor.checks import MachineReport, run_checks
from vllm_spark.doctor.finding import Finding
from vllm_spark.doctor.model.question import ModelQuestion
from vllm_spark.doctor.network_path import PathProbe, check_clocks, check_packets, check_ports, open_port, reaches
from vllm_spark.doctor.system import System
from vllm_spark.errors import PeerLostError
from vllm_spark.executor.channel.addresses import (
    host_name,
    interface_of,
    is_loopback,
    leader_address,
    source_address,
)
from vllm_spark.executor.channel.framing import Connection, Frame, Kind
from vllm_spark.executor.handshake.messages import Reason, decode_frame
from vllm_spark.executor.handshake.server import listener_at
from vllm_spark.records import to_json

logger = logging.getLogger("vllm_spark")

_CHECK_SECONDS = 120.0
"""Limit for the checks of a machine: external programs may take about 20 s each."""

_SEND_SECONDS = 10.0
_END_REASON = "the remote check is complete"


@dataclasses.dataclass(frozen=True)
class CheckRequest:
    """The request for a report.

    Attributes:
        host: the machine that sends it.
        model: that it is to serve.
        port: where it listens for the machine that gets the request; 0 if nowhere.
    """

    host: str
    model: ModelQuestion | None = None
    port: Annotated[int, Field(ge=0, le=65535)] = 0


def request_report(
    config: SparkConfig,
    patience: float,
    model: ModelQuestion | None = None,
    found: Callable[[Finding], None] = lambda finding: None,
) -> tuple[MachineReport, str]:
    """Waits at most `patience` seconds for a follower, and returns its report and its IP address.

    Args:
        config: this machine's settings.
        patience: seconds to wait for a follower.
        model: that the follower is asked about; None to ask about none.
        found: called with each finding about the network path, also if the follower is lost afterwards.

    Raises:
        SparkError: no follower connected, it did not answer, or a setting is invalid.
    """
    address = leader_address(config)
    listener = listener_at(address, config, any_versions=True)
    try:
        hello, connection = listener.wait_for_any_follower(patience)
    finally:
        # Closed before the request: the follower searches for a leader afterwards, and must not find this listener.
        listener.close()
    try:
        there = connection.peer_address
        logger.info("The follower on %s (%s) has connected; requesting its report.", hello.host, there)
        if ":" not in there and not is_loopback(there):
            found(check_packets(System(), interface_of(address), address, there))
        with open_port(address) as port:
            connection.send(Kind.CHECK_REQUEST, to_json(CheckRequest(host_name(), model, port)), timeout=_SEND_SECONDS)
            machine = decode_frame(connection.expect(Kind.CHECK_REPORT, timeout=_CHECK_SECONDS), MachineReport)
        if machine.path_probe is not None:
            found(check_clocks(machine.host, machine.path_probe.time - time.time()))
            arrived = not machine.path_probe.port or reaches(there, machine.path_probe.port)
            found(check_ports(machine.host, arrived, machine.path_probe.reached))
        connection.send(Kind.LEAVE, to_json(Reason(_END_REASON)), timeout=_SEND_SECONDS)
    except PeerLostError as error:
        raise PeerLostError(
            f"{error}; another version of vllm-spark there may not support remote checks: see the output of its "
            "vllm-spark join"
        ) from None
    finally:
        connection.close()
    return machine, there


def send_report(connection: Connection, question: Frame, config: SparkConfig, leader: str) -> None:
    """The follower's side: checks this machine, sends the report, and waits for the other side to close.

    Args:
        connection: the control connection.
        question: the CHECK_REQUEST message.
        config: the follower's settings.
        leader: address of the machine that runs `doctor --peer`.

    Raises:
        PeerLostError: the connection is lost.
    """
    request = decode_frame(question, CheckRequest)
    logger.info("vllm-spark doctor on %s (%s) requests a report of this machine.", request.host, leader)
    machine = run_checks(System(), config, leader, thorough=True, model=request.model)
    reached = reaches(leader, request.port) if request.port else None
    with open_port(source_address(leader) or leader) as port:
        machine = dataclasses.replace(machine, path_probe=PathProbe(time.time(), port, reached))
        connection.send(Kind.CHECK_REPORT, to_json(machine), timeout=_SEND_SECONDS)
        connection.expect(Kind.LEAVE, timeout=_CHECK_SECONDS)
