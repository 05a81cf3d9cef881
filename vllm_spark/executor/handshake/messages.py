"""What leader and follower say until both know that they fit.

All of it is JSON over an authenticated connection: nothing is unpickled before both sides have agreed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from vllm_spark.config.settings import DEFAULT_PORT, SparkConfig, split_endpoint
from vllm_spark.executor.channel.addresses import is_loopback
from vllm_spark.executor.channel.framing import ChannelError, Frame
from vllm_spark.executor.environment import Environment
from vllm_spark.executor.handshake.versions import Versions
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.processes.known_types import known

CONTROL, CALLS, GROUPS = LANES = "control", "calls", "groups"
"""The lanes that a follower asks for."""

GREETING_TIMEOUT = 5.0
"""Seconds for one connection to authenticate and to say who it is."""

PROGRESS_INTERVAL = 10.0
"""Seconds between two messages of a follower that takes its time for an offer."""

Message = TypeVar("Message", bound=msgspec.Struct)


class Hello(msgspec.Struct, frozen=True):
    """A follower's first words on each lane."""

    lane: str
    session: str
    host: str
    process: int
    versions: Versions


class Welcome(msgspec.Struct, frozen=True):
    """The leader's answer to a Hello that it takes."""

    host: str
    process: int


class Reason(msgspec.Struct, frozen=True):
    """Why a connection, a model or the common work was ended.

    Attributes:
        sentence: for the other side's user.
        details: a traceback, for its log.
        final: True if trying again cannot help: the versions differ.
    """

    sentence: str
    details: str = ""
    final: bool = False


class Offer(msgspec.Struct, frozen=True):
    """What the leader serves: the follower must have the same files, wherever it has them.

    Attributes:
        model: its name, for messages.
        files: everything that both ranks load from files.
        heartbeat_timeout: of the session, in seconds.
    """

    model: str
    files: list[LoadedFiles]
    heartbeat_timeout: float
    environment: Environment = Environment()


class Progress(msgspec.Struct, frozen=True):
    """What a follower does before it answers an offer, at least once in `PROGRESS_INTERVAL`."""

    activity: str


known(Hello, Welcome, Reason, Offer, Progress)


def decode(frame: Frame, kind: type[Message]) -> Message:
    """The JSON message in `frame`.

    Raises:
        ChannelError: it is none of that type.
    """
    try:
        return msgspec.json.decode(frame.payload, type=kind)
    except msgspec.MsgspecError as error:
        raise ChannelError(f"a {frame.kind.name} message could not be read: {error}") from None


def join_command(endpoint: str, secret_file: Path | None) -> str:
    """The command that makes the other machine follow the leader at `endpoint`."""
    return f"vllm-spark join --leader {endpoint}" + (f" --secret-file {secret_file}" if secret_file else "")


def serve_command(host: str, port: int, config: SparkConfig) -> str:
    """The command that makes the machine at `host` a leader that a follower with `config` finds."""
    command = "vllm serve MODEL --spark"
    if not is_loopback(host):
        command += f" --spark-address {host}"
    if port != DEFAULT_PORT:
        command += f" --spark-port {port}"
    if config.secret_file is not None:
        command += f" --spark-secret-file {config.secret_file}"
    return command


def where_to_type(endpoint: str) -> str:
    """Where the other side's command belongs: `on the other machine`, or in another terminal of this one."""
    host, _ = split_endpoint(endpoint)
    return "in another terminal" if is_loopback(host) else "on the other machine"
