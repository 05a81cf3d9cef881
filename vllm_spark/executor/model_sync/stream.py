"""One stream of a copy: asks the other machine for ranges of files, and writes them.

`run` is a loop over jobs. For a follower it is a process of its own (`python -m` this module), since one interpreter
decrypts no more than about a gigabyte a second; the leader, which cannot connect to its follower, runs it in threads.
Jobs and events are JSON, one a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal

from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import PeerLostError, RefusedError, SparkError
from vllm_spark.executor.channel.framing import MIB, ChannelError, Connection, Frame, Kind
from vllm_spark.executor.handshake.client import Connector, make_connector
from vllm_spark.executor.handshake.messages import COPY, LARGEST_PIECE, CopyRange, Reason, decode_frame
from vllm_spark.executor.model_sync.staging import Checksum, Range, checksum_at, is_full, open_data
from vllm_spark.records import from_json, to_json

SILENCE_TIMEOUT = 60.0
"""Seconds of silence after which a copy connection counts as lost."""

_REQUEST_TIMEOUT = 10.0


@dataclasses.dataclass(frozen=True)
class StreamSettings:
    """The first line for a stream's process: how it connects."""

    config: str
    host: str
    port: int
    session: str


@dataclasses.dataclass(frozen=True)
class Job:
    """A range that is to be in a file.

    Attributes:
        key: of the model, as `content_key`.
        file: its number in the manifest.
        path: the file of this machine.
        offset, length: the range.
        checksum: of its bytes if it arrived in an earlier attempt; it is fetched only if they have another one.
    """

    key: str
    file: int
    path: str
    offset: int
    length: int
    checksum: str = ""


@dataclasses.dataclass(frozen=True)
class Event:
    """What a stream reports.

    Attributes:
        bytes: that were written, or found to be there, since the last event.
        checksum: of the range, at its end; else empty.
        fetched: whether the range came from the other machine.
        error: why the stream ends; a sentence.
        failure: its kind: the other machine's refusal, no room on the disk, another error of this machine's files, or
            the connection is lost.
    """

    bytes: int = 0
    checksum: str = ""
    fetched: bool = False
    error: str = ""
    failure: Literal["", "refused", "full", "file", "lost"] = ""


def run(connect: Callable[[], Connection], jobs: IO[bytes], events: IO[bytes]) -> None:
    """Does jobs until there are none; a failure is an event, after which it ends.

    Args:
        connect: makes the copy connection, when it is first needed. Raises SparkError.
        jobs: lines with a `Job`.
        events: takes lines with an `Event`.
    """
    connection: Connection | None = None
    # Of the last job alone: there may be more files than descriptors, and jobs go file by file.
    path, descriptor = "", -1
    buffer = memoryview(bytearray(LARGEST_PIECE))

    def report(event: Event) -> None:
        events.write(to_json(event) + b"\n")
        events.flush()

    try:
        for line in iter(jobs.readline, b""):
            job = from_json(line, Job)
            if job.path != path:
                if descriptor >= 0:
                    os.close(descriptor)
                    descriptor = -1
                path, descriptor = job.path, open_data(Path(job.path))
            piece = Range(job.offset, job.length)
            if job.checksum and checksum_at(descriptor, piece, buffer) == job.checksum:
                report(Event(bytes=job.length, checksum=job.checksum))
                continue
            if connection is None:
                connection = connect()
            checksum = _fetch(connection, job, descriptor, buffer, lambda count: report(Event(bytes=count)))
            report(Event(checksum=checksum, fetched=True))
    except BrokenPipeError:
        return  # the process that started this one has ended
    except PeerLostError as error:
        failure = Event(error=str(error), failure="lost")
    except SparkError as error:
        failure = Event(error=str(error), failure="refused")
    except OSError as error:
        failure = Event(error=error.strerror or str(error), failure="full" if is_full(error) else "file")
    else:
        return
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        if connection is not None:
            connection.close()
    with contextlib.suppress(OSError, ValueError):
        report(failure)


def _fetch(
    connection: Connection, job: Job, descriptor: int, buffer: memoryview, written: Callable[[int], None]
) -> str:
    """Fetches a range and writes it; returns the checksum of its bytes."""
    request = CopyRange(job.key, job.file, job.offset, job.length)
    connection.send(Kind.COPY_RANGE, to_json(request), timeout=_REQUEST_TIMEOUT)
    checksum, at, end, unreported = Checksum(), job.offset, job.offset + job.length, 0
    while at < end:
        count = connection.receive_data(Kind.COPY_DATA, buffer[: min(len(buffer), end - at)], timeout=SILENCE_TIMEOUT)
        if isinstance(count, Frame):
            raise _failure(connection, count)
        checksum.update(buffer[:count])
        _write(descriptor, buffer[:count], at)
        at, unreported = at + count, unreported + count
        if unreported >= 8 * MIB or at == end:
            written(unreported)
            unreported = 0
    last = connection.receive(timeout=SILENCE_TIMEOUT)
    if last.kind is not Kind.COPY_END:
        raise _failure(connection, last)
    return checksum.hex()


def _write(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, at)
        data, at = data[count:], at + count


def _failure(connection: Connection, frame: Frame) -> SparkError:
    if frame.kind is Kind.FAILURE:
        return RefusedError(decode_frame(frame, Reason).sentence)
    return ChannelError(f"{connection.peer} sent {frame.kind.name} where a part of a file was expected")


def connect_copy(connector: Connector) -> Connection:
    """A copy connection of a follower to its leader.

    Raises:
        SparkError: the leader is not there, or does not accept it.
    """
    connection = connector.connect(COPY)
    if connection is None:
        problem = connector.last_problem.rstrip(".") or "it stopped listening"
        raise PeerLostError(f"the leader at {connector.endpoint} cannot be reached: {problem}")
    return connection


def main() -> int:
    """The process of a stream of a follower: settings, then jobs from stdin, events to stdout."""
    jobs, events = sys.stdin.buffer, sys.stdout.buffer
    settings = from_json(jobs.readline(), StreamSettings)
    config = SparkConfig.model_validate_json(settings.config)
    run(lambda: connect_copy(make_connector(config, settings.host, settings.port, settings.session)), jobs, events)
    return 0


if __name__ == "__main__":
    sys.exit(main())
