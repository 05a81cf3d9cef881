"""What leader and follower say until both know that they fit.

All of it is JSON over an authenticated connection: nothing is unpickled before both sides have agreed.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from vllm_spark.executor.channel import ChannelError, Frame
from vllm_spark.executor.model_identity import ModelIdentity
from vllm_spark.executor.versions import Versions
from vllm_spark.known_types import known

CONTROL, CALLS, GROUPS = LANES = "control", "calls", "groups"
"""The lanes that a follower asks for."""

GREETING_TIMEOUT = 5.0
"""Seconds for one connection to authenticate and to say who it is."""

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
    """Why a connection, a model or the common work was ended."""

    sentence: str
    details: str = ""


class Offer(msgspec.Struct, frozen=True):
    """What the leader serves; the follower must have the same."""

    model: str
    revision: str | None
    load_format: str
    with_weights: bool
    identity: ModelIdentity
    heartbeat_timeout: float


known(Hello, Welcome, Reason, Offer)


def decode(frame: Frame, kind: type[Message]) -> Message:
    """The JSON message in `frame`.

    Raises:
        ChannelError: it is none of that type.
    """
    try:
        return msgspec.json.decode(frame.payload, type=kind)
    except msgspec.MsgspecError as error:
        raise ChannelError(f"a {frame.kind.name} message could not be read: {error}") from None
