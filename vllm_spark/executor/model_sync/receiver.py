"""Copies the files of a model to this machine: distributes ranges over streams, and puts complete files in place."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import selectors
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from vllm_spark.errors import PeerLostError, RefusedError, SparkError, without_stop
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.channel.framing import Connection, Kind
from vllm_spark.executor.handshake.messages import CopyList, CopyState, Reason, decode_frame
from vllm_spark.executor.model_files.comparison import file_digest
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.executor.model_files.own import content_key
from vllm_spark.executor.model_sync.destination import Place, choose_place, free_bytes
from vllm_spark.executor.model_sync.manifest import CopiedFile, Manifest, check_manifest
from vllm_spark.executor.model_sync.progress import RateMeter, duration_text, size_text
from vllm_spark.executor.model_sync.remedies import Remedies
from vllm_spark.executor.model_sync.staging import Staging, is_full, ranges_of
from vllm_spark.executor.model_sync.stream import SILENCE_TIMEOUT, Event, Job, StreamSettings, run
from vllm_spark.processes.child import KILL_SECONDS, end_with_parent, python_module
from vllm_spark.records import RecordError, from_json, to_json

logger = logging.getLogger("vllm_spark")

MOST_STREAMS = 8
_SPARE_BYTES = 16 << 20  # of the disk, for folders and journals
_REPORT_INTERVAL = 1.0
_LIST_TIMEOUT = 600.0  # seconds for the other machine to read small files and samples of large ones
_EVENT_TIMEOUT = SILENCE_TIMEOUT + 30.0  # a stream reports its own time-out first
_STREAM_MODULE = "vllm_spark.executor.model_sync.stream"


class Stream(ABC):
    """A running loop of `stream.run`: `send` gives it a job, and its events are lines at `events`."""

    events: IO[bytes]
    _jobs: IO[bytes]

    def send(self, job: Job) -> None:
        """Gives it a job. Raises BrokenPipeError if it has ended."""
        self._jobs.write(to_json(job) + b"\n")
        self._jobs.flush()

    @abstractmethod
    def close(self) -> None:
        """Ends it, whatever it does."""


class ProcessStream(Stream):
    """A stream in a process of its own, which ends with this one.

    Args:
        settings: how it connects.
        lock: the staging folder's, held until it has ended.

    Raises:
        PeerLostError: the process ended at its start.
    """

    def __init__(self, settings: StreamSettings, lock: int) -> None:
        self._process = subprocess.Popen(
            python_module(_STREAM_MODULE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[lock],
            preexec_fn=end_with_parent(os.getpid()),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # Unbuffered on this side: a selector sees what is in the pipe alone.
        self._jobs, self.events = self._process.stdin, self._process.stdout
        try:
            self._jobs.write(to_json(settings) + b"\n")
            self._jobs.flush()
        except BrokenPipeError:
            self.close()
            raise PeerLostError(
                "a process that copies files was killed or crashed at its start; see dmesg, and try again"
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """As `Stream.close`: kills it."""
        self._process.kill()
        for pipe in (self._jobs, self.events):
            with contextlib.suppress(OSError):
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_SECONDS)


class ThreadStream(Stream):
    """A stream in a thread, over a connection that is there.

    Args:
        connection: taken, also if the stream cannot be started.

    Raises:
        OSError, RuntimeError: this process may have no further file or thread.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        with contextlib.ExitStack() as unused:
            unused.callback(connection.close)
            jobs, self._jobs = (unused.enter_context(end) for end in _pipe())
            self.events, events = (unused.enter_context(end) for end in _pipe())

            def work() -> None:
                with jobs, events, contextlib.suppress(BrokenPipeError):
                    run(lambda: connection, jobs, events)

            self._thread = threading.Thread(target=work, name="spark-copy", daemon=True)
            self._thread.start()
            unused.pop_all()

    def close(self) -> None:
        """As `Stream.close`: interrupts its connection."""
        self._connection.interrupt()
        with contextlib.suppress(OSError):
            self._jobs.close()
        self._thread.join(KILL_SECONDS)
        self.events.close()
        self._connection.close()


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    return os.fdopen(reader, "rb"), os.fdopen(writer, "wb")


def start_all(makers: Iterable[Callable[[], Stream]]) -> list[Stream]:
    """The streams that `makers` start; if one cannot be started, the others are closed, and its error is raised."""
    with contextlib.ExitStack() as unused:
        streams = []
        for make in makers:
            streams.append(stream := make())
            unused.callback(stream.close)
        unused.pop_all()
    return streams


OpenStreams = Callable[[int, int], list[Stream]]
"""Makes so many streams; the second argument is the lock of the staging folder."""


def ask_for_list(connection: Connection, wanted: LoadedFiles) -> Manifest:
    """The other machine's list of files, checked.

    Raises:
        RefusedError: it refuses, or the list is invalid.
        PeerLostError: it does not answer.
    """
    connection.send(Kind.COPY_LIST, to_json(CopyList(content_key(wanted))), timeout=SILENCE_TIMEOUT)
    frame = connection.expect(Kind.COPY_FILES, Kind.FAILURE, timeout=_LIST_TIMEOUT)
    if frame.kind is Kind.FAILURE:
        raise RefusedError(decode_frame(frame, Reason).sentence)
    manifest = decode_frame(frame, Manifest)
    check_manifest(manifest, wanted)
    return manifest


def copy_files(
    wanted: LoadedFiles,
    manifest: Manifest,
    mapping: Mapping[str, Path],
    open_streams: OpenStreams,
    report: Callable[[CopyState], None],
    *,
    place: Place | None = None,
) -> Path:
    """Copies what is not here, and returns where the model is then.

    Args:
        wanted: what the other machine has.
        manifest: its files.
        mapping: folders of this machine, by the other one's names or paths.
        open_streams: makes streams.
        report: called with the state once a second.
        place: where it goes; chosen by default.

    Raises:
        RefusedError: it does not fit on the disk, another version is in its place, a file was changed, or this user may
            not write there. What has arrived stays, and is not copied again.
        PeerLostError: the connection was lost; the same.
    """
    place = place or choose_place(wanted, manifest, mapping)
    # Where the other side is offline, vLLM has put a path in place of the hub's name.
    name = f"{wanted.what} {wanted.name if wanted.hub is None else wanted.hub.repository}"
    try:
        with Staging(place.staging, place.remedies) as staging:
            place.recover(staging, manifest)
            missing = [file for file in manifest.files if place.find(file) is None]
            _check_room(name, place, staging, missing)
            arrived = {file: staging.data(file) for file in missing}
            if missing:
                _Copy(name, content_key(wanted), manifest, missing, staging, report, place.remedies).run(open_streams)
            place.put(arrived, manifest)
            staging.remove()
    except OSError as error:
        raise RefusedError(_cannot_be_written(name, place, error)) from None
    logger.info("The %s is in %s.", name, place.result)
    return place.result


def _cannot_be_written(name: str, place: Place, error: OSError) -> str:
    """The sentence for an error of this machine's files."""
    reason = without_stop(error.strerror or str(error))
    if error.filename is not None:
        reason += f": {error.filename}"
    if is_full(error):
        return (
            f"the disk of {place.staging.parent} on {host_name()} is full while the {name} is copied ({reason}); make "
            f"room there, {place.remedies.again}"
        )
    sentence = f"the {name} cannot be copied to {place.result} on {host_name()} ({reason})"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{sentence}; let this user write there, or {place.remedies.folder}"
    return f"{sentence}; {_again(place.remedies)}"


def _again(remedies: Remedies) -> str:
    """The remedy for an error of a disk whose cause is not known."""
    return f"{remedies.retry}, and if that fails too, look at the disk (dmesg)"


def stream_count(size: int) -> int:
    """How many streams copy so many bytes: one for each core, up to eight, and no more than there is work for."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(MOST_STREAMS, cores, -(-size // (64 << 20))))


class _Copy:
    """One copy that runs: which ranges are missing, who fetches them, and what has arrived."""

    def __init__(
        self,
        name: str,
        key: str,
        manifest: Manifest,
        missing: list[CopiedFile],
        staging: Staging,
        report: Callable[[CopyState], None],
        remedies: Remedies,
    ) -> None:
        self._name, self._staging, self._report, self._remedies = name, staging, report, remedies
        self._total = sum(file.size for file in missing)
        numbers = {file.name: number for number, file in enumerate(manifest.files)}
        self._jobs: deque[tuple[CopiedFile, Job]] = deque()
        self._open_ranges: dict[CopiedFile, int] = {}
        before = 0
        for file in missing:
            pieces, arrived = ranges_of(file.size), staging.arrived(file)
            self._open_ranges[file] = len(pieces)
            before += sum(piece.length for piece in pieces if piece.offset in arrived)
            for piece in pieces:
                job = Job(key, numbers[file.name], str(staging.data(file)), *piece, arrived.get(piece.offset, ""))
                self._jobs.append((file, job))
        self._done = 0
        self._started = time.monotonic()
        self._fetched = 0
        self._meter = RateMeter()
        self._next_report = 0.0
        earlier = f"; {size_text(before)} have arrived in an earlier attempt" if before else ""
        logger.info(
            "Copying the %s to this machine: %s in %d file%s%s.",
            name,
            size_text(self._total),
            len(missing),
            "" if len(missing) == 1 else "s",
            earlier,
        )

    def run(self, open_streams: OpenStreams) -> None:
        """Copies all files."""
        streams = open_streams(stream_count(self._total), self._staging.lock)
        try:
            with _Finisher(self._name, self._staging, self._remedies, self._show) as finisher:
                self._distribute(streams, finisher)
        finally:
            for stream in streams:
                stream.close()
        seconds = time.monotonic() - self._started
        logger.info(
            "Copied the %s: %s in %s, %s/s.",
            self._name,
            size_text(self._fetched),
            duration_text(seconds),
            size_text(self._fetched / max(seconds, 1e-3)),
        )

    def _distribute(self, streams: list[Stream], finisher: _Finisher) -> None:
        running: dict[Stream, tuple[CopiedFile, Job]] = {}
        lines = {stream: bytearray() for stream in streams}
        last = dict.fromkeys(streams, time.monotonic())
        with selectors.DefaultSelector() as selector:
            for stream in streams:
                os.set_blocking(stream.events.fileno(), False)
                selector.register(stream.events, selectors.EVENT_READ, stream)
                self._next_job(stream, running)
            while running:
                finisher.check()
                for key, _ in selector.select(_REPORT_INTERVAL):
                    stream = key.data
                    last[stream] = time.monotonic()
                    for event in self._read(stream, lines[stream]):
                        self._take(stream, event, running, finisher)
                    if stream not in running:
                        selector.unregister(stream.events)
                for stream in running:
                    if time.monotonic() - last[stream] > _EVENT_TIMEOUT:
                        raise PeerLostError(
                            f"a stream of the copy of the {self._name} has not moved for {_EVENT_TIMEOUT:g} s"
                        )
                self._show()
        self._show(force=True)

    def _next_job(self, stream: Stream, running: dict[Stream, tuple[CopiedFile, Job]]) -> None:
        if self._jobs:
            running[stream] = self._jobs.popleft()
            with contextlib.suppress(BrokenPipeError):  # its events, or their end, have the reason
                stream.send(running[stream][1])

    def _read(self, stream: Stream, line: bytearray) -> Iterator[Event]:
        try:
            data = os.read(stream.events.fileno(), 1 << 16)
        except BlockingIOError:
            return
        if not data:
            raise PeerLostError(f"a process that copies the {self._name} was killed or crashed; see dmesg")
        line += data
        *complete, rest = bytes(line).split(b"\n")
        line[:] = rest
        for each in complete:
            try:
                yield from_json(each, Event)
            except RecordError as error:
                raise SparkError(f"a process that copies the {self._name} sent an invalid event: {error}") from None

    def _take(
        self, stream: Stream, event: Event, running: dict[Stream, tuple[CopiedFile, Job]], finisher: _Finisher
    ) -> None:
        if event.error:
            raise self._failure(event)
        self._done += event.bytes
        if not event.checksum:
            return
        file, job = running.pop(stream)
        if event.fetched:
            self._fetched += job.length
            self._staging.record(file, job.offset, event.checksum)
        self._open_ranges[file] -= 1
        if self._open_ranges[file] == 0:
            finisher.finish(file)
        self._next_job(stream, running)

    def _failure(self, event: Event) -> SparkError:
        reason = without_stop(event.error)
        copied = f"{size_text(self._done)} of {size_text(self._total)} of the {self._name}"
        if event.failure == "lost":
            return PeerLostError(f"{reason}; {copied} have arrived{self._remedies.rest}")
        if event.failure == "full":
            return RefusedError(
                f"the disk of {self._staging.folder} on {host_name()} is full after {copied} ({reason}); make room "
                f"there, {self._remedies.again}"
            )
        if event.failure == "file":
            return RefusedError(
                f"{self._staging.folder} on {host_name()} cannot be written ({reason}); {_again(self._remedies)}"
            )
        return RefusedError(reason)

    def _show(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if force or now >= self._next_report:
            self._next_report = now + _REPORT_INTERVAL
            self._report(CopyState(self._name, self._done, self._total, self._meter.rate(self._done)))


class _Finisher:
    """Writes complete files to the disk and compares them, in a thread of its own while others arrive.

    Args:
        name: of the model, in messages.
        staging: where the files are.
        remedies: what a user can do.
        show: called about once a second while files are written after the last one has arrived.
    """

    def __init__(self, name: str, staging: Staging, remedies: Remedies, show: Callable[[], None]) -> None:
        self._name, self._staging, self._remedies, self._show = name, staging, remedies, show
        self._files: queue.SimpleQueue[CopiedFile | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="spark-copy-finish", daemon=True)
        self._thread.start()

    def __enter__(self) -> _Finisher:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._stopped = kind is not None
        self._files.put(None)
        try:
            while self._thread.is_alive():  # the disk alone bounds how long it takes to write
                self._thread.join(_REPORT_INTERVAL)
                if kind is None:
                    self._show()  # the other machine waits for it
        except BaseException:
            self._stopped = True
            self._thread.join()
            raise
        if kind is None:
            self.check()

    def finish(self, file: CopiedFile) -> None:
        """All ranges of the file have arrived."""
        self._files.put(file)

    def check(self) -> None:
        """Raises what went wrong."""
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while (file := self._files.get()) is not None and not self._stopped:
                self._finish(file)
        except BaseException as error:
            self._error = error

    def _finish(self, file: CopiedFile) -> None:
        path = self._staging.data(file)
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size != file.size:
                os.ftruncate(descriptor, file.size)
            os.fsync(descriptor)
            digest = file_digest(path)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        if digest != file.digest:
            self._staging.forget(file)
            raise RefusedError(
                f"the file {file.name} of the {self._name} has another content here than on the other machine after it "
                f"was copied; {self._remedies.retry}, and if that fails too, look at memory and disk of both machines"
            )


def _check_room(name: str, place: Place, staging: Staging, missing: list[CopiedFile]) -> None:
    """Raises RefusedError unless all missing files fit on the disk; deletes parts of other versions if they do not."""
    needed = sum(file.size - staging.allocated(file) for file in missing) + (_SPARE_BYTES if missing else 0)
    if needed > free_bytes(place):
        staging.forget_others(missing)
    if needed > (free := free_bytes(place)):
        raise RefusedError(
            f"the {name} needs {size_text(needed)} more on {host_name()}, and {size_text(free)} are free at "
            f"{place.staging.parent}; make room there, or {place.remedies.folder}"
        )
