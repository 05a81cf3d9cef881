"""The connection between two machines that run the same command, one with `--listen` and one with `--connect`.

It is that of a leader and its follower: TLS by the shared secret, and equal versions on both sides.
"""

from __future__ import annotations

import shlex
import time
from functools import partial
from pathlib import Path

from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import PeerLostError, lower_first, without_stop
from vllm_spark.executor.channel.addresses import leader_address, leader_endpoint
from vllm_spark.executor.channel.framing import Connection
from vllm_spark.executor.handshake.client import make_connector
from vllm_spark.executor.handshake.messages import CONTROL
from vllm_spark.executor.handshake.server import listener_at

_RETRY_SECONDS = 0.5


def await_connection(config: SparkConfig, patience: float, command: str) -> Connection:
    """Waits at most `patience` seconds for the other machine.

    Args:
        config: the address and port to listen at, and the secret.
        command: what runs on both machines, without `--listen` and `--connect`.

    Raises:
        SparkError: it did not connect, has other versions or another secret, or a setting is invalid.
    """
    listener = listener_at(leader_address(config), config, suggest_command=partial(_connect_command, command))
    try:
        hello, connection = listener.wait_for_any_follower(patience)
    finally:
        listener.close()
    connection.peer = f"the other machine ({hello.host})"
    return connection


def open_connection(config: SparkConfig, patience: float, command: str) -> Connection:
    """Tries for at most `patience` seconds to connect to the machine that listens at `config.leader`.

    Args:
        config: the other machine's address, the port, and the secret.
        command: as of `await_connection`.

    Raises:
        SparkError: nothing listens there, it has other versions or another secret, or a setting is invalid.
    """
    host, port = leader_endpoint(config)
    connector = make_connector(config, host, port)
    end = time.monotonic() + patience
    while (connection := connector.connect(CONTROL)) is None:
        if time.monotonic() > end:
            what = "no program of vllm-spark answered" if connector.last_problem else "nothing listened"
            problem = f" ({lower_first(without_stop(connector.last_problem))})" if connector.last_problem else ""
            raise PeerLostError(
                f"{what} at {connector.endpoint} within {patience:g} s{problem}; on that machine run: "
                f"{command} --listen --address {host}"
            )
        time.sleep(_RETRY_SECONDS)
    connection.peer = f"the other machine ({connector.endpoint})"
    return connection


def _connect_command(command: str, endpoint: str, secret_file: Path | None) -> str:
    """The command for the other machine, if this one listens at `endpoint`."""
    secret = f" --secret-file {shlex.quote(str(secret_file))}" if secret_file else ""
    return f"{command} --connect {endpoint}{secret}"
