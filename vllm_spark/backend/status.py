"""The board on which an engine shows both ranks' counters, and why it failed, to the process that started it.

It is one page of anonymous shared memory, opened by the API server before the engine starts: gone with
its processes, however they end.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import msgspec

from vllm_spark.compat.patching import ANNOUNCED
from vllm_spark.errors import SparkError
from vllm_spark.processes.known_types import known
from vllm_spark.ranks import RANKS

BOARD_VARIABLE = ANNOUNCED
"""Where the board is: `/proc/PID/fd/NUMBER`, a space, and its inode: another process may have got that number since."""

_MEMORY_NAME = "vllm-spark-counters"
_FAILURE, _AT_WORK = len(RANKS), len(RANKS) + 1
_SLOTS = len(RANKS) + 2
_SLOT = 4096
# Length and checksum of a record: a reader that catches it half written sees that they do not match, whatever
# order the stores became visible in.
_HEADER = struct.Struct("<II")
_READ_ATTEMPTS = 100
_LONGEST_SENTENCE = 600  # characters; JSON takes up to six bytes for one


class _Failure(msgspec.Struct):
    sentence: str
    exit_code: int


class _AtWork(msgspec.Struct):
    process: int
    left: bool = False
    in_order: bool = False


class RankCounters(msgspec.Struct):
    """One rank's work so far."""

    rank: int
    steps: int = 0
    digest: str = ""
    all_reduces: int = 0
    all_gathers: int = 0
    all_reduce_bytes: int = 0
    all_gather_bytes: int = 0
    fallbacks: int = 0
    wait_seconds: float = 0.0
    packet_messages: int = 0
    payload_messages: int = 0
    chunked_operations: int = 0
    proxy_posts: int = 0
    rails_up: int = 0
    rail_failures: int = 0
    rail_recoveries: int = 0
    rail_proof_failures: int = 0
    rails_held_down: int = 0
    reposts: int = 0


known(_Failure, _AtWork, RankCounters)


class CounterBoard:
    """The records of one engine: one per rank, and two for its state. One process writes, others read; none waits.

    Args:
        descriptor: of the memory; stays the caller's. None for a board that forgets everything.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._map = None if descriptor is None else mmap.mmap(descriptor, _SLOT * _SLOTS)
        self._own: int | None = None

    @classmethod
    def create(cls) -> CounterBoard:
        """A new board for one engine, announced to it and to the processes that this one starts from now on.

        Its memory can be opened by others until `withdraw`, or until this process ends.
        """
        descriptor = os.memfd_create(_MEMORY_NAME, os.MFD_CLOEXEC)
        os.ftruncate(descriptor, _SLOT * _SLOTS)
        os.environ[BOARD_VARIABLE] = f"/proc/{os.getpid()}/fd/{descriptor} {os.fstat(descriptor).st_ino}"
        board = cls(descriptor)
        board._own = descriptor
        return board

    def withdraw(self) -> None:
        """Ends the announcement of a board that this process made: another engine gets one of its own.

        Whoever has opened it keeps it. May be called again.
        """
        descriptor, self._own = self._own, None
        if descriptor is not None:
            os.close(descriptor)

    @classmethod
    def from_environment(cls) -> CounterBoard:
        """The board that a parent process announced; one that forgets everything if there is none, or none any more."""
        path, _, inode = os.environ.get(BOARD_VARIABLE, "").partition(" ")
        try:
            # Looked at before it is opened, which is no harmless thing to do with every file.
            if os.readlink(path) != f"/memfd:{_MEMORY_NAME} (deleted)" or str(os.stat(path).st_ino) != inode:
                return cls(None)
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return cls(None)
        try:
            return cls(descriptor)
        finally:
            os.close(descriptor)

    def fail(self, error: SparkError) -> None:
        """Leaves the reason why the engine did not start, or stopped."""
        sentence = str(error)
        if len(sentence) > _LONGEST_SENTENCE:
            sentence = sentence[:_LONGEST_SENTENCE] + " [...]"
        self._put(_FAILURE, _Failure(sentence, error.exit_code))

    def clear(self) -> None:
        """Removes every record: an engine starts, and what an earlier one left here does not describe it."""
        for slot in range(_SLOTS):
            self._clear(slot)

    def begin_work(self) -> None:
        """Says that the engine is this process, and runs until it calls `end_work` or leaves a reason."""
        self._put(_AT_WORK, _AtWork(os.getpid()))

    def end_work(self, *, in_order: bool) -> None:
        """Says that the engine ends by itself: because it was asked to, or by an error of vLLM's own."""
        self._put(_AT_WORK, _AtWork(os.getpid(), left=True, in_order=in_order))

    def ended_in_order(self) -> bool:
        """Whether the engine has ended because it was asked to."""
        record = self._at_work()
        return record is not None and record.in_order

    def failure(self) -> SparkError | None:
        """The reason that the engine left, with its exit code; None if it left none."""
        payload = self._get(_FAILURE)
        if payload is None:
            return None
        record = msgspec.json.decode(payload, type=_Failure)
        error = SparkError(record.sentence)
        error.exit_code = record.exit_code
        return error

    def death(self) -> SparkError | None:
        """Why the engine ended: the reason that it left, or that it was killed; None if it runs, or ended by itself."""
        if failure := self.failure():
            return failure
        record = self._at_work()
        if record is None or record.left:
            return None
        if not _has_ended(record.process):
            return None  # it failed by an error of vLLM's own, which the log has, and is on its way out
        return SparkError(
            f"the engine (process {record.process}) ended without a word: killed by hand, by the kernel when memory "
            "ran out (see dmesg), or because it did not end in time; start it again, with less memory if that was it"
        )

    def write(self, counters: RankCounters | dict[str, Any]) -> None:
        """Replaces the record of the rank that `counters` names."""
        record = msgspec.convert(counters, RankCounters) if isinstance(counters, dict) else counters
        self._put(record.rank, record)

    def read(self) -> list[RankCounters]:
        """The ranks' records written so far."""
        payloads = [self._get(rank) for rank in RANKS]
        return [msgspec.json.decode(payload, type=RankCounters) for payload in payloads if payload is not None]

    def _at_work(self) -> _AtWork | None:
        payload = self._get(_AT_WORK)
        return None if payload is None else msgspec.json.decode(payload, type=_AtWork)

    def _put(self, slot: int, record: msgspec.Struct) -> None:
        if self._map is None:
            return
        payload = msgspec.json.encode(record)
        assert len(payload) <= _SLOT - _HEADER.size, "a record fits its slot"
        start = slot * _SLOT
        self._map[start : start + _HEADER.size + len(payload)] = (
            _HEADER.pack(len(payload), zlib.crc32(payload)) + payload
        )

    def _clear(self, slot: int) -> None:
        if self._map is not None:
            self._map[slot * _SLOT : slot * _SLOT + _HEADER.size] = bytes(_HEADER.size)

    def _get(self, slot: int) -> bytes | None:
        if self._map is None:
            return None
        for _ in range(_READ_ATTEMPTS):
            length, checksum = _HEADER.unpack_from(self._map, slot * _SLOT)
            if length == 0:
                return None
            start = slot * _SLOT + _HEADER.size
            payload = self._map[start : start + min(length, _SLOT - _HEADER.size)]
            if zlib.crc32(payload) == checksum:
                return payload
        return None


def _has_ended(process: int) -> bool:
    """Whether nothing is left of it, or only its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


def engine_failure() -> SparkError | None:
    """Why the engine that this process started, or is, did not start or stopped; None if no reason was left."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return CounterBoard.from_environment().failure()
    return None


def engine_death() -> SparkError | None:
    """The same of an engine that has ended, also if it was killed; None if it ended itself, or there is no board."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return CounterBoard.from_environment().death()
    return None


def engine_ended_in_order() -> bool:
    """Whether the engine that this process started has ended because it was asked to."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return CounterBoard.from_environment().ended_in_order()
    return False
