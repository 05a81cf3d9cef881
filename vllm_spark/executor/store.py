"""The key-value store of torch's process groups, over the groups connection, and its registration with torch.

The leader holds the table; `PairStore` is torch's interface to it on both ranks. torch's own TCPStore would listen on a
port of its own, unauthenticated, and would wait up to half an hour for a follower that has died.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError, Store, distributed_c10d, is_initialized, register_rendezvous_handler

from vllm_spark.backend.process_group import use_messages
from vllm_spark.executor.group_connection import GroupConnection, Message
from vllm_spark.ranks import LEADER_RANK, WORLD_SIZE
from vllm_spark.records import Bytes, from_json, to_json

INIT_METHOD = "spark://pair"
"""The URL by which torch uses this store."""

logger = logging.getLogger("vllm_spark")

_SPLIT_GROUPS = "VLLM_DISTRIBUTED_USE_SPLIT_GROUP"
_REQUESTS, _ANSWERS = "store requests", "store answers"
_DEFAULT_TIMEOUT = timedelta(minutes=5)
_ANSWER_SECONDS = 60.0  # for the leader's answer to an operation that does not wait for a key

Respond = Callable[[list[bytes]], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """One operation of the store."""

    operation: str
    keys: list[str]
    values: list[Bytes]


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to one operation."""

    values: list[Bytes]


class Table:
    """The leader's keys and values. An operation that needs missing keys is answered once they are set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}
        self._waiting: list[tuple[Request, Respond]] = []

    def run(self, request: Request, respond: Respond) -> None:
        """Calls `respond` with the answer, now or once the keys are set.

        Raises:
            ValueError, IndexError: the request is invalid; it is not answered.
        """
        answers: list[tuple[Respond, list[bytes]]] = []
        with self._lock:
            own = self._answer(request)  # may raise, before anything is changed
            if own is None:
                self._waiting.append((request, respond))
            else:
                answers.append((respond, own))
            progress = own is not None
            while progress:  # an answered request may have set keys for which another one waits
                progress = False
                for waiting in list(self._waiting):
                    answer = self._answer(waiting[0])
                    if answer is not None:
                        self._waiting.remove(waiting)
                        answers.append((waiting[1], answer))
                        progress = True
        for call, answer in answers:
            call(answer)

    def _answer(self, request: Request) -> list[bytes] | None:
        """The answer; None if the operation must wait for its keys."""
        keys, values = request.keys, request.values
        key = keys[0] if keys else ""
        match request.operation:
            case "set":
                self._values.update(zip(keys, values, strict=True))
                return []
            case "get":
                return [self._values[key] for key in keys] if self._has(keys) else None
            case "wait":
                return [] if self._has(keys) else None
            case "check":
                return [b"1" if self._has(keys) else b"0"]
            case "add":
                self._values[key] = b"%d" % (int(self._values.get(key, b"0")) + int(values[0]))
                return [self._values[key]]
            case "append":
                self._values[key] = self._values.get(key, b"") + values[0]
                return []
            case "compare_set":
                expected, desired = values
                if self._values.get(key, b"") == expected:
                    self._values[key] = desired
                return [self._values.get(key, expected)]
            case "delete":
                return [b"0" if self._values.pop(key, None) is None else b"1"]
            case "list":
                return [name.encode() for name in self._values]
            case unknown:
                raise ValueError(f"the store has no operation {unknown!r}")

    def _has(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)


class PairStore(Store):  # type: ignore[misc]
    """torch's interface to the store, on one rank.

    Args:
        link: this rank's end of the groups connection.
        rank: this rank; the leader holds the table.
    """

    def __init__(self, link: GroupConnection, rank: int) -> None:
        super().__init__()
        self._link, self._rank = link, rank
        self._numbers = itertools.count()
        self._limit = _DEFAULT_TIMEOUT
        self._table = Table()
        if rank == LEADER_RANK:
            link.handle(_REQUESTS, self._serve)

    def set(self, key: str, value: str | bytes) -> None:
        """Sets one key."""
        self._run("set", [key], [_bytes(value)])

    def multi_set(self, keys: list[str], values: list[str | bytes]) -> None:
        """Sets several keys."""
        self._run("set", keys, [_bytes(value) for value in values])

    def get(self, key: str) -> bytes:
        """A key's value; waits for it. Raises DistStoreError after the store's time-out."""
        return self._run("get", [key], timeout=self._limit)[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Several keys' values; waits for them as `get`."""
        return self._run("get", keys, timeout=self._limit)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Waits for several keys. Raises DistStoreError after `timeout`."""
        self._run("wait", keys, timeout=timeout or self._limit)

    def check(self, keys: list[str]) -> bool:
        """True if all of `keys` are set."""
        return self._run("check", keys) == [b"1"]

    def add(self, key: str, value: int) -> int:
        """Adds to a counter, and returns its new value."""
        return int(self._run("add", [key], [b"%d" % value])[0])

    def append(self, key: str, value: str | bytes) -> None:
        """Appends to a key's value."""
        self._run("append", [key], [_bytes(value)])

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Sets a key if it has the expected value; returns the value that it has then."""
        return self._run("compare_set", [key], [_bytes(expected), _bytes(desired)])[0]

    def delete_key(self, key: str) -> bool:
        """Deletes a key; True if it was set."""
        return self._run("delete", [key]) == [b"1"]

    def list_keys(self) -> list[str]:
        """All keys that are set."""
        return [name.decode() for name in self._run("list", [])]

    def num_keys(self) -> int:
        """Number of keys that are set."""
        return len(self.list_keys())

    def has_extended_api(self) -> bool:
        """True: append, multi_get and multi_set exist."""
        return True

    def clone(self) -> PairStore:
        """This store: it is thread-safe."""
        return self

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets how long `get` and `wait` wait by default."""
        self._limit = timeout

    # The names that torch's C++ code calls.
    getNumKeys = num_keys
    deleteKey = delete_key

    @property
    def timeout(self) -> timedelta:
        """The time that `get` and `wait` wait by default."""
        return self._limit

    def _run(
        self, operation: str, keys: list[str], values: list[bytes] | None = None, timeout: timedelta | None = None
    ) -> list[bytes]:
        number = next(self._numbers)
        request = Request(operation, keys, values or [])
        answer = "", _ANSWERS, number
        if self._rank == LEADER_RANK:
            self._table.run(request, lambda found: self._link.deliver(answer, "", to_json(Answer(found))))
        else:
            self._link.send(("", _REQUESTS, number), "", to_json(request))
        seconds = _ANSWER_SECONDS if timeout is None else timeout.total_seconds()
        try:
            return from_json(bytes(self._link.take(answer, "", seconds)), Answer).values
        except TimeoutError:
            raise DistStoreError(
                f"the pair's store has no answer to {operation} of {', '.join(keys)} after {seconds:g} s: "
                f"the other side ({self._link.peer}) has not come so far"
            ) from None

    def _serve(self, number: int, message: Message) -> None:
        request = from_json(bytes(message.data), Request)
        answer = "", _ANSWERS, number
        self._table.run(request, lambda found: self._link.send(answer, "", to_json(Answer(found))))


_current: tuple[PairStore, int] | None = None
_registered = False


def open_groups(link: GroupConnection, rank: int, longest: timedelta = timedelta.max) -> None:
    """Makes torch's process groups in this process, and their store, use the groups connection.

    Args:
        link: this rank's end of it.
        rank: this rank.
        longest: how long an operation of a group waits for the other rank at most by default.
    """
    global _current, _registered
    if not _registered:
        register_rendezvous_handler("spark", _rendezvous)
        _registered = True
    if os.environ.get(_SPLIT_GROUPS, "0") not in ("", "0"):
        logger.warning("%s is ignored: it would create gloo groups, which open ports of their own.", _SPLIT_GROUPS)
        os.environ[_SPLIT_GROUPS] = "0"
    _current = PairStore(link, rank), rank
    use_messages(link, longest)
    if not is_initialized():
        # torch names groups by a counter, which a failed start in this process has advanced. The follower's process is
        # new, so both ranks start at 0.
        distributed_c10d._world.group_count = 0


def close_groups() -> None:
    """Makes torch create its own groups in this process again."""
    global _current
    _current = None
    use_messages(None)


def _rendezvous(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Store, int, int]]:
    assert _current is not None, "vLLM initializes its process groups while the pair starts"
    store, rank = _current
    store.set_timeout(timeout)
    yield store, rank, WORLD_SIZE


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
