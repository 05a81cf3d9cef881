"""How the machines of `vllm-spark bench wire` find each other: over the authenticated channel of leader and follower.

The machine with `--listen` is the leader, the other one the follower. All that they say is JSON; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import select
import time
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

from vllm_spark.config import SparkConfig
from vllm_spark.errors import PeerLostError, RefusedError
from vllm_spark.executor.caller import Caller
from vllm_spark.executor.channel import MIB, ChannelError, Frame, Kind, Lane
from vllm_spark.executor.credentials import tls_context
from vllm_spark.executor.link import leader_address, leader_endpoint
from vllm_spark.executor.listener import Listener
from vllm_spark.executor.messages import CONTROL, Reason, decode
from vllm_spark.executor.secret import load_secret

_GREETING_SECONDS = 30.0
_SEND_SECONDS = 10.0
_STEP_SECONDS = 1800.0
"""How long one step may take on the other machine; one that is gone is noticed by the kernel or by its rail."""
_RETRY_SECONDS = 0.5

_Message = TypeVar("_Message", bound=msgspec.Struct)


def _connect_command(endpoint: str, secret_file: Path | None) -> str:
    """What makes the other machine measure with the one that listens at `endpoint`."""
    secret = f" --secret-file {secret_file}" if secret_file else ""
    return f"vllm-spark bench wire --connect {endpoint}{secret}"


class Meeting:
    """The lane to the other machine, while both measure. A context manager: at its end the other one hears why."""

    def __init__(self, lane: Lane, other: str) -> None:
        self._lane, self._other = lane, other
        self._early: list[Frame] = []

    @classmethod
    def listen(cls, config: SparkConfig, patience: float) -> Meeting:
        """Waits at most `patience` seconds for the other machine.

        Raises:
            SparkError: it did not come, or has other versions or another secret; or a setting is unusable.
        """
        address = leader_address(config)
        listener = Listener(
            address,
            config.port,
            tls_context(load_secret(config, address), "leader"),
            config.max_frame_mib * MIB,
            config.secret_file,
            invitation=_connect_command,
        )
        try:
            hello, lane = listener.wait_for_visitor(patience)
        finally:
            listener.close()
        lane.peer = f"the other machine ({hello.host})"
        return cls(lane, "vllm-spark bench wire --connect")

    @classmethod
    def connect(cls, config: SparkConfig, patience: float) -> Meeting:
        """Looks for at most `patience` seconds for the machine that listens at `config.leader`.

        Raises:
            SparkError: nobody listens there, or with other versions or another secret; or a setting is unusable.
        """
        host, port = leader_endpoint(config)
        caller = Caller(host, port, tls_context(load_secret(config, host), "follower"), config.max_frame_mib * MIB)
        end = time.monotonic() + patience
        while (lane := caller.connect(CONTROL)) is None:
            if time.monotonic() > end:
                raise PeerLostError(
                    f"nobody listened at {caller.endpoint} within {patience:g} s; on that machine run: "
                    f"vllm-spark bench wire --listen --address {host}"
                )
            time.sleep(_RETRY_SECONDS)
        lane.peer = f"the other machine ({caller.endpoint})"
        return cls(lane, "vllm-spark bench wire --listen")

    def greet(self, mine: _Message, kind: type[_Message]) -> _Message:
        """Gives the other machine the first message, and returns its own.

        Raises:
            RefusedError: what is there is something else, such as `vllm-spark join` or a server.
        """
        try:
            self._lane.send(Kind.EXCHANGE, msgspec.json.encode(mine), timeout=_SEND_SECONDS)
            return decode(self._lane.expect(Kind.EXCHANGE, timeout=_GREETING_SECONDS), kind)
        except ChannelError as error:
            raise RefusedError(
                f"{error}; run {self._other} there, and neither vllm-spark join nor vllm serve meanwhile"
            ) from None

    def exchange(self, mine: bytes) -> bytes:
        """Gives the other machine `mine` and returns its half, which is at the same place of the same schedule.

        Raises:
            PeerLostError: it is gone, or has failed.
        """
        self.attend()  # first: one that has failed says why and hangs up, and then nothing can be sent
        self._lane.send(Kind.EXCHANGE, mine, timeout=_SEND_SECONDS)
        frame = self._early.pop() if self._early else self._receive()
        return frame.payload

    def attend(self) -> None:
        """Takes what the other machine has said, if it has said something: it may be that it has failed.

        Raises:
            PeerLostError: it is gone, or has failed.
        """
        poll = select.poll()
        poll.register(self._lane, select.POLLIN)
        if self._lane.pending or poll.poll(0):
            self._early.append(self._receive(_SEND_SECONDS))  # the rest of what has begun to come

    def _receive(self, timeout: float = _STEP_SECONDS) -> Frame:
        frame = self._lane.expect(Kind.EXCHANGE, Kind.FAILURE, timeout=timeout)
        if frame.kind is Kind.FAILURE:
            raise PeerLostError(f"{self._lane.peer} gave up: {decode(frame, Reason).sentence}")
        return frame

    def __enter__(self) -> Meeting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            sentence = "it was stopped there" if isinstance(error, KeyboardInterrupt) else str(error)
            with contextlib.suppress(PeerLostError):
                self._lane.send(Kind.FAILURE, msgspec.json.encode(Reason(sentence)), timeout=_SEND_SECONDS)
        self._lane.close()
