"""The status of an engine (both ranks' counters, whether it runs, why it failed), for the process that started it.

`EngineStatus` is anonymous shared memory that the API server creates before the engine starts; it disappears with its
processes, however they end. `engine_failure`, `engine_death` and
`engine_ended_on_request` read the one of this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vllm_spark.backend.pair_status.records import PairFacts, Readings
from vllm_spark.compat.patching import ANNOUNCED
from vllm_spark.errors import SparkError
from vllm_spark.ranks import RANKS
from vllm_spark.records import RecordError, from_json, to_json

STATUS_VARIABLE = ANNOUNCED
"""Holds the memory's path `/proc/PID/fd/NUMBER`, and its inode, because PID and NUMBER may have been reused."""

SERVER_STOPPED = "the server was stopped"
"""Why a request ends whose engine ended because it was told to."""

_MEMORY_NAME = "vllm-spark-counters"
_FAILURE, _RUN, _STOP, _FACTS = range(len(RANKS), len(RANKS) + 4)
_READINGS = _FACTS + 1  # of the first rank
_SLOTS = _READINGS + len(RANKS)
_SLOT = 16384
# Length and checksum of a record: they do not match while it is half written, in whatever order the stores become
# visible.
_HEADER = struct.Struct("<II")
_READ_ATTEMPTS = 100
_MAX_SENTENCE = 600  # characters; JSON takes up to six bytes for one


@dataclasses.dataclass
class _Failure:
    sentence: str
    exit_code: int


@dataclasses.dataclass
class _Run:
    process: int
    ended: bool = False
    clean: bool = False


@dataclasses.dataclass
class _Stop:
    process: int


@dataclasses.dataclass
class RankCounters:
    """The counters of one rank."""

    rank: Annotated[int, Field(ge=0, lt=len(RANKS))]
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
    rail_posts: tuple[int, ...] = ()
    rail_bytes: tuple[int, ...] = ()
    rail_doorbells: tuple[int, ...] = ()


class EngineStatus:
    """The records of one engine: two per rank, and four of its own. Each has one writer, and is read without locks.

    Args:
        descriptor: of the memory; the caller closes it. None for an object that stores nothing.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._map = None if descriptor is None else mmap.mmap(descriptor, _SLOT * _SLOTS)
        self._own: int | None = None

    @classmethod
    def create(cls) -> EngineStatus:
        """Creates the memory for one engine, and publishes it in the environment of the processes started from now on.

        They can open it until `unpublish`, or until this process ends.
        """
        descriptor = os.memfd_create(_MEMORY_NAME, os.MFD_CLOEXEC)
        os.ftruncate(descriptor, _SLOT * _SLOTS)
        os.environ[STATUS_VARIABLE] = f"/proc/{os.getpid()}/fd/{descriptor} {os.fstat(descriptor).st_ino}"
        status = cls(descriptor)
        status._own = descriptor
        return status

    def unpublish(self) -> None:
        """Closes this process's descriptor, so that no other process can open the memory; may be called again.

        Processes that have opened it keep it.
        """
        descriptor, self._own = self._own, None
        if descriptor is not None:
            os.close(descriptor)

    @classmethod
    def from_environment(cls) -> EngineStatus:
        """Opens the memory that a parent process published; without one, the object stores nothing."""
        path, _, inode = os.environ.get(STATUS_VARIABLE, "").partition(" ")
        try:
            # Checked before it is opened, because opening some files has side effects.
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
        """Records why the engine did not start, or failed."""
        sentence = str(error)
        if len(sentence) > _MAX_SENTENCE:
            sentence = sentence[:_MAX_SENTENCE] + " [...]"
        self._put(_FAILURE, _Failure(sentence, error.exit_code))

    def clear(self) -> None:
        """Removes every record, at the start of an engine: those of an earlier one do not describe it."""
        for slot in range(_SLOTS):
            self._clear(slot)

    def mark_started(self) -> None:
        """Records that this process is the engine and runs, until `mark_ended` or `fail`."""
        self._put(_RUN, _Run(os.getpid()))

    def mark_ended(self, *, clean: bool) -> None:
        """Records that the engine ends by itself: `clean` if it was asked to, else by an error of vLLM's."""
        self._put(_RUN, _Run(os.getpid(), ended=True, clean=clean))

    def mark_stop_requested(self) -> None:
        """Records that the running engine is told to end; however it ends, it does not count as a failure now.

        Does nothing if it does not run: the reason why it ended stays.
        """
        record = self._run_record()
        if record is None or record.ended or self.failure() is not None or _has_ended(record.process):
            return
        self._put(_STOP, _Stop(record.process))

    def stop_requested(self) -> bool:
        """Whether the engine was told to end while it ran."""
        payload, record = self._get(_STOP), self._run_record()
        return payload is not None and record is not None and from_json(payload, _Stop).process == record.process

    def ended_on_request(self) -> bool:
        """Whether the engine ended, or is going to, because it was told to."""
        record = self._run_record()
        return self.stop_requested() or (record is not None and record.clean)

    def failure(self) -> SparkError | None:
        """The recorded reason of a failure, with its exit code; None without one."""
        payload = self._get(_FAILURE)
        if payload is None:
            return None
        record = from_json(payload, _Failure)
        error = SparkError(record.sentence)
        error.exit_code = record.exit_code
        return error

    def death(self) -> SparkError | None:
        """Why the engine ended: the recorded reason, or a kill or crash.

        None if it runs, ended by itself, or was told to end before (vLLM then kills it if it takes too long).
        """
        if self.stop_requested():
            return None
        if failure := self.failure():
            return failure
        record = self._run_record()
        if record is None or record.ended:
            return None
        if not _has_ended(record.process):
            return None  # it is still exiting after an error of vLLM's, which is in the log
        return SparkError(
            f"the engine (process {record.process}) was killed or crashed (exit status unknown; see dmesg for the OOM "
            "killer); start it again, with less memory if it ran out of memory"
        )

    def write(self, counters: RankCounters) -> None:
        """Replaces the record of the rank that `counters` names."""
        self._put(counters.rank, counters)

    def read(self) -> list[RankCounters]:
        """The ranks' records written so far."""
        payloads = [self._get(rank) for rank in RANKS]
        return [from_json(payload, RankCounters) for payload in payloads if payload is not None]

    def write_facts(self, facts: PairFacts) -> None:
        """Records what the pair consists of."""
        self._put(_FACTS, facts)

    def read_facts(self) -> PairFacts | None:
        """What the pair consists of; None before it has started."""
        payload = self._get(_FACTS)
        return None if payload is None else from_json(payload, PairFacts)

    def write_readings(self, rank: int, readings: Readings) -> None:
        """Replaces what the machine of a rank measures."""
        self._put(_READINGS + rank, readings)

    def read_readings(self, rank: int) -> Readings | None:
        """What the machine of a rank measures; None if it has not reported yet."""
        payload = self._get(_READINGS + rank)
        return None if payload is None else from_json(payload, Readings)

    def _run_record(self) -> _Run | None:
        payload = self._get(_RUN)
        return None if payload is None else from_json(payload, _Run)

    def _put(self, slot: int, record: Any) -> None:
        if self._map is None:
            return
        payload = to_json(record)
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
    """Whether the process does not exist, or is a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


def engine_failure() -> SparkError | None:
    """The recorded reason why the engine that this process started, or is, failed; None without one."""
    with contextlib.suppress(OSError, RecordError):
        return EngineStatus.from_environment().failure()
    return None


def engine_death() -> SparkError | None:
    """Why the engine that this process started ended, also if it was killed; None if it runs or ended by itself."""
    with contextlib.suppress(OSError, RecordError):
        return EngineStatus.from_environment().death()
    return None


def record_stop_request() -> None:
    """Records that the engine that this process started is told to end, if it runs."""
    with contextlib.suppress(OSError, RecordError):
        EngineStatus.from_environment().mark_stop_requested()


def engine_ended_on_request() -> bool:
    """Whether the engine that this process started ended, or is going to, because it was told to."""
    with contextlib.suppress(OSError, RecordError):
        return EngineStatus.from_environment().ended_on_request()
    return False
