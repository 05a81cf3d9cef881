"""What leader and follower say until both know that they fit.

All of it is JSON over an authenticated connection: nothing is unpickled before both sides have agreed.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from vllm_spark.executor.channel import ChannelError, Frame
from vllm_spark.executor.environment import Environment
from vllm_spark.executor.loaded_files import LoadedFiles
from vllm_spark.executor.versions import Versions
from vllm_spark.known_types import known

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
