"""Copies what a follower has to its leader: one that lacks a model which its follower has asks for it before it starts.

The leader listens, sends SEARCH in place of an OFFER, and copies what was found over connections that the follower
opens when it is told how many (SEND). Then the leader ends the session, and starts as if it had always had the files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import PeerLostError, RefusedError, upper_first
from vllm_spark.executor.channel.framing import Connection, Frame, Kind
from vllm_spark.executor.handshake.client import Connector
from vllm_spark.executor.handshake.messages import (
    CopyState,
    FoundFiles,
    Progress,
    Reason,
    Search,
    Send,
    Sought,
    decode_frame,
)
from vllm_spark.executor.handshake.server import listener_at
from vllm_spark.executor.model_files.comparison import ModelIdentity
from vllm_spark.executor.model_files.hub_cache import cached_snapshot, hub_place_of, is_path
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.executor.model_files.weights import CONSOLIDATED, missing_weights
from vllm_spark.executor.model_sync.destination import FolderPlace, Place, SnapshotPlace, choose_place
from vllm_spark.executor.model_sync.manifest import Manifest, is_hub_place
from vllm_spark.executor.model_sync.progress import CopyDisplay
from vllm_spark.executor.model_sync.receiver import (
    MOST_STREAMS,
    Stream,
    ThreadStream,
    ask_for_list,
    copy_files,
    start_all,
)
from vllm_spark.executor.model_sync.remedies import LEADER_REMEDIES
from vllm_spark.executor.model_sync.sender import ModelSender
from vllm_spark.executor.model_sync.stream import connect_copy
from vllm_spark.records import to_json

logger = logging.getLogger("vllm_spark")

_SEND_TIMEOUT = 10.0
_FIND_TIMEOUT = 300.0  # seconds for the follower to read samples of its files
_CONNECTION_TIMEOUT = 30.0  # seconds for a copy connection that was asked for
_SILENCE_TIMEOUT = 300.0  # seconds without a message: the leader writes to its disk


def fetch_from_follower(
    config: SparkConfig, address: str, wanted: list[Sought], timeout: float, cache: str | None = None
) -> list[Path | None]:
    """Copies to this machine, a leader's, what its follower has of `wanted`.

    Args:
        config: the leader's settings.
        address: where it listens.
        wanted: what is not here.
        timeout: seconds to wait for a follower.
        cache: the hub cache's folder; None for this user's.

    Returns:
        For each where it is now; None if the follower does not have it either.

    Raises:
        PeerLostError: no follower connected in time.
        RefusedError: the follower was lost after it was asked; it does not fit on the disk; or it cannot be copied for
            another reason. What has arrived is not copied again.
    """
    arrived: queue.SimpleQueue[Connection] = queue.SimpleQueue()
    listener = listener_at(address, config, serve_copy=arrived.put)
    control: Connection | None = None
    names = ", ".join(f"the {each.what} {each.name}" for each in wanted)
    try:
        hello, control = listener.wait_for_any_follower(timeout)
        logger.info("Asking the follower on %s for %s.", hello.host, names)
        control.send(Kind.SEARCH, to_json(Search(wanted)), timeout=_SEND_TIMEOUT)
        found = decode_frame(control.expect(Kind.FOUND, timeout=_FIND_TIMEOUT), FoundFiles).files
        if len(found) != len(wanted):
            raise RefusedError(f"the follower on {hello.host} answered for {len(found)} of {len(wanted)} models")
        copier = _Copier(control, arrived, cache)
        places = [
            None if files is None else copier.copy(each, files) for each, files in zip(wanted, found, strict=True)
        ]
        with contextlib.suppress(PeerLostError):  # all of it is here
            control.send(Kind.LEAVE, to_json(Reason("the leader has what it asked for")), timeout=_SEND_TIMEOUT)
        return places
    except RefusedError as error:
        if control is not None:
            with contextlib.suppress(PeerLostError):  # the error is why
                control.send(Kind.FAILURE, to_json(Reason(str(error))), timeout=_SEND_TIMEOUT)
        raise
    except PeerLostError as error:
        if control is None:
            raise
        raise RefusedError(
            f"the follower on {hello.host} was lost after it was asked for {names} ({error}); start this command "
            "again, and the copy continues"
        ) from None
    finally:
        if control is not None:
            control.close()
        listener.close()
        while not arrived.empty():
            arrived.get().close()


class _Copier:
    """The leader's side of a session in which the follower sends."""

    def __init__(self, control: Connection, arrived: queue.SimpleQueue[Connection], cache: str | None) -> None:
        self._control, self._arrived, self._cache = control, arrived, cache

    def copy(self, sought: Sought, files: LoadedFiles) -> Path:
        """Copies one model."""
        (connection,) = self._connections(1)
        try:
            manifest = ask_for_list(connection, files)
        finally:
            connection.close()
        with CopyDisplay("Copying from the follower") as display:

            def report(state: CopyState) -> None:
                display.show(state)
                self._control.send(
                    Kind.PROGRESS, to_json(Progress(f"copying the {state.what}", state)), timeout=_SEND_TIMEOUT
                )

            place = _place_of(sought, files, manifest, self._cache)
            return copy_files(files, manifest, {}, self._open_streams, report, place=place)

    def _open_streams(self, count: int, lock: int) -> list[Stream]:
        connections = self._connections(count)
        with contextlib.ExitStack() as unused:
            for connection in connections:
                unused.callback(connection.close)
            streams = start_all(partial(ThreadStream, connection) for connection in connections)
            unused.pop_all()
        return streams

    def _connections(self, count: int) -> list[Connection]:
        self._control.send(Kind.SEND, to_json(Send(count)), timeout=_SEND_TIMEOUT)
        connections: list[Connection] = []
        deadline = time.monotonic() + _CONNECTION_TIMEOUT
        try:
            while len(connections) < count:
                connections.append(self._arrived.get(timeout=max(0.0, deadline - time.monotonic())))
        except queue.Empty:
            for connection in connections:
                connection.close()
            raise PeerLostError(
                f"{self._control.peer} opened {len(connections)} of {count} copy connections within "
                f"{_CONNECTION_TIMEOUT:g} s"
            ) from None
        return connections


def _place_of(sought: Sought, files: LoadedFiles, manifest: Manifest, cache: str | None) -> Place:
    """The place that vLLM will look at: the path that the user gave, or the hub's cache under that name."""
    if is_path(sought.name):
        place: Place = FolderPlace(_path_of(sought.name), files, remedies=LEADER_REMEDIES)
    elif files.hub is not None and files.hub.repository == sought.name and is_hub_place(files.hub):
        place = SnapshotPlace(files.hub, files, cache, remedies=LEADER_REMEDIES)
    else:
        return choose_place(files, manifest, {}, remedies=LEADER_REMEDIES)
    if error := place.conflict(manifest):
        raise error
    return place


def _path_of(name: str) -> Path:
    """The absolute path on this machine that a name which is a path means."""
    return Path(os.path.abspath(os.path.expanduser(name)))


def answer_search(control: Connection, frame: Frame, connector: Connector, config: SparkConfig) -> None:
    """The follower's side: finds what a leader asks for, and sends it until the leader has it.

    Args:
        control: the control connection.
        frame: the SEARCH.
        connector: of this session.
        config: this follower's settings.

    Raises:
        PeerLostError: the leader was lost.
        RefusedError: it could not take the files.
    """
    wanted = decode_frame(frame, Search).wanted
    found = [find_named(each, config.mapped_folders) for each in wanted]
    for sought, files in zip(wanted, found, strict=True):
        where = "is not here" if files is None else f"is in {files.place} here"
        logger.info(
            "The leader at %s asks for the %s %s, which %s.", connector.endpoint, sought.what, sought.name, where
        )
    sender = ModelSender()
    sender.offer([files for files in found if files is not None])
    control.send(Kind.FOUND, to_json(FoundFiles(found)), timeout=_SEND_TIMEOUT)
    try:
        with CopyDisplay("Sending to the leader") as display:
            while (order := control.expect(*_ORDERS, timeout=_SILENCE_TIMEOUT)).kind is not Kind.LEAVE:
                if order.kind is Kind.FAILURE:
                    raise RefusedError(f"the leader at {connector.endpoint}: {decode_frame(order, Reason).sentence}")
                if order.kind is Kind.SEND:
                    for _ in range(min(decode_frame(order, Send).streams, MOST_STREAMS)):
                        connection = connect_copy(connector)
                        threading.Thread(
                            target=sender.serve, args=(connection,), name="spark-copy", daemon=True
                        ).start()
                elif (state := decode_frame(order, Progress).copy) is not None:
                    display.show(state)
    finally:
        sender.close()
    logger.info("The leader at %s has what it asked for.", connector.endpoint)


_ORDERS = (Kind.SEND, Kind.PROGRESS, Kind.LEAVE, Kind.FAILURE)


def find_named(sought: Sought, mapping: Mapping[str, Path]) -> LoadedFiles | None:
    """What this machine has under a leader's name or path; None if it is not here or not complete.

    Args:
        sought: what the leader asks for.
        mapping: folders of this machine, by the leader's names or paths.
    """
    if (mapped := mapping.get(sought.name)) is not None:
        place: Path | None = mapped
    elif is_path(sought.name):
        place = _path_of(sought.name)
    else:
        place = cached_snapshot(sought.name, sought.revision)
    if place is None or not os.path.isdir(place):
        return None
    load_format = "mistral" if any(place.glob(CONSOLIDATED)) else "hf"
    everything = sought.kind == "model"
    try:
        identity = ModelIdentity.of(
            place, kind=sought.kind, with_code=everything, with_tokenizer=everything, load_format=load_format
        )
    except RefusedError as error:
        logger.warning("%s.", upper_first(str(error)))
        return None
    complete = bool(identity.configuration) and (bool(identity.weights) or sought.kind == "tokenizer")
    if not complete or (sought.kind == "model" and missing_weights(place, load_format)):
        return None
    hub = hub_place_of(place)
    return LoadedFiles(
        sought.what,
        sought.name,
        str(place),
        sought.kind,
        identity,
        "path" if hub is None else "hub",
        hub,
        with_code=everything,
        with_tokenizer=everything,
        revision=sought.revision,
        load_format=load_format,
    )
