"""The messages of the handshake between leader and follower, and the commands that its log lines suggest.

`Hello`, `Welcome`, `Offer`, `Progress` and `Reason` are JSON over an authenticated connection: nothing is unpickled
before both sides have agreed on versions and files. `join_command` and `serve_command` make the command for the other
machine.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, FiniteFloat

from vllm_spark.config.settings import DEFAULT_PORT, SparkConfig, split_endpoint
from vllm_spark.executor.channel.addresses import is_loopback
from vllm_spark.executor.channel.framing import ChannelError, Frame
from vllm_spark.executor.environment import Environment
from vllm_spark.executor.handshake.versions import Versions
from vllm_spark.executor.model_files.comparison import Kind as FileKind
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.memory.need import MemoryNeed
from vllm_spark.records import RecordError, from_json

CONTROL, RPC, GROUPS, COPY = CONNECTIONS = "control", "rpc", "groups", "copy"
"""The connections that a follower opens: one of each in a session, and any number of `copy` while files are copied."""

LARGEST_PIECE = 256 << 10
"""Bytes of a COPY_DATA, at most: a sender reads and encrypts them in a core's cache."""

GREETING_TIMEOUT = 5.0
"""Seconds for one connection to authenticate and to send its HELLO."""

CHECK = "check"
"""In place of a connection's name in the HELLO of `vllm-spark doctor --leader`: the leader answers, and closes it."""

PROGRESS_INTERVAL = 10.0
"""Seconds between two PROGRESS messages of a follower that has not answered an offer yet."""

Message = TypeVar("Message")


@dataclasses.dataclass(frozen=True)
class Hello:
    """The first message of a follower on each connection."""

    connection: Annotated[str, Field(alias="lane")]  # its name on the wire, for any version
    session: str
    host: str
    process: int
    versions: Versions


@dataclasses.dataclass(frozen=True)
class Welcome:
    """The leader's answer to a Hello that it accepts."""

    host: str
    process: int


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a connection or an offer was refused, or why the session ended.

    Attributes:
        sentence: for the other side's user.
        details: a traceback, for its log.
        final: True if a retry cannot succeed: the versions differ.
    """

    sentence: str
    details: str = ""
    final: bool = False


@dataclasses.dataclass(frozen=True)
class Offer:
    """The model that the leader serves: the follower must have the same files, in any location.

    Attributes:
        model: its name, for messages.
        files: everything that both ranks load from files.
        heartbeat_timeout: of the session, in seconds.
        sends_files: whether the leader sends what the follower lacks.
        memory: what each rank allocates.
    """

    model: str
    files: list[LoadedFiles]
    heartbeat_timeout: FiniteFloat
    environment: Environment = dataclasses.field(default_factory=Environment)
    sends_files: bool = False
    memory: MemoryNeed = dataclasses.field(default_factory=MemoryNeed)


@dataclasses.dataclass(frozen=True)
class CopyState:
    """How far a copy is.

    Attributes:
        what: what is copied, such as "model NAME".
        done, total: bytes.
        rate: bytes per second, over the last seconds; 0 if it is not known yet.
    """

    what: str
    done: int
    total: int
    rate: FiniteFloat = 0.0


@dataclasses.dataclass(frozen=True)
class Progress:
    """The activity of a follower before it answers an offer, or of a leader that copies from its follower.

    Sent at least every `PROGRESS_INTERVAL`, and more often while `copy` is not None.
    """

    activity: str
    copy: CopyState | None = None


@dataclasses.dataclass(frozen=True)
class CopyList:
    """Asks for the list of files of what has this `content_key`."""

    key: str


@dataclasses.dataclass(frozen=True)
class CopyRange:
    """Asks for a range of a file, by its number in that list; `offset` and `length` are bytes."""

    key: str
    file: int
    offset: int
    length: int


@dataclasses.dataclass(frozen=True)
class Sought:
    """Something that a leader does not have, and asks its follower for before it starts.

    Attributes:
        what: how messages call it.
        name: of a hub, or the path that the leader was given.
        revision: of a name of a hub.
        kind: what it is.
    """

    what: str
    name: str
    kind: FileKind
    revision: str | None = None


@dataclasses.dataclass(frozen=True)
class Search:
    """What a leader asks for in place of an OFFER."""

    wanted: list[Sought]


@dataclasses.dataclass(frozen=True)
class FoundFiles:
    """The answer: for each in the same order what the follower has, or None."""

    files: list[LoadedFiles | None]


@dataclasses.dataclass(frozen=True)
class Send:
    """How many copy connections a follower opens to send what it has."""

    streams: int


def decode_frame(frame: Frame, kind: type[Message]) -> Message:
    """The JSON message in `frame`.

    Raises:
        ChannelError: it is not a message of that type.
    """
    try:
        return from_json(frame.payload, kind)
    except RecordError as error:
        raise ChannelError(f"a {frame.kind.name} message could not be read: {error}") from None


def join_command(endpoint: str, secret_file: Path | None) -> str:
    """The command that starts a follower for the leader at `endpoint`."""
    # A relative path may be another file in the folder where the command is typed.
    secret = f" --secret-file {shlex.quote(os.path.abspath(secret_file))}" if secret_file else ""
    return f"vllm-spark join --leader {endpoint}{secret}"


def serve_command(host: str, port: int, config: SparkConfig) -> str:
    """The command that starts a leader at `host`, to which a follower with `config` connects."""
    command = "vllm serve MODEL --spark"
    if not is_loopback(host):
        command += f" --spark-address {host}"
    if port != DEFAULT_PORT:
        command += f" --spark-port {port}"
    if config.secret_file is not None:
        command += f" --spark-secret-file {shlex.quote(os.path.abspath(config.secret_file))}"
    return command


def where_to_run(endpoint: str) -> str:
    """The place to run the other side's command: `on the other machine`, or `in another terminal` of this one."""
    host, _ = split_endpoint(endpoint)
    return "in another terminal" if is_loopback(host) else "on the other machine"
