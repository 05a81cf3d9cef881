"""A torch process group for CPU tensors whose messages use the pair's authenticated connection.

vLLM asks torch for gloo groups to coordinate its ranks: some broadcasts, barriers and gathered objects while it starts,
and on the CPU what the collective runtime does not support. gloo listens on random ports, unauthenticated, and its data
is unpickled. `PairGroup` does the same operations over the groups connection; it is written for two ranks and rare
calls, not for speed.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch.distributed import Backend, ProcessGroup, ReduceOp, Work

from vllm_spark.errors import PeerLostError, PeerTimeoutError, SparkError
from vllm_spark.ranks import WORLD_SIZE

BACKEND = "spark"
"""torch's name of this backend of process groups."""

_COLLECTIVES = "collectives"
_UNSET = timedelta(0)  # torch's marker for "the group's time-out" is negative

Tensors = list[torch.Tensor]
Address = tuple[str, str, int]
"""Address of a message: group, stream within it, number. Both ranks run a group's operations in the same order."""

Reduction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_REDUCTIONS: tuple[tuple[Any, str, Reduction], ...] = (
    (ReduceOp.SUM, "sum", torch.add),
    (ReduceOp.AVG, "average", lambda first, second: (first + second) / 2),
    (ReduceOp.PRODUCT, "product", torch.mul),
    (ReduceOp.MIN, "minimum", torch.minimum),
    (ReduceOp.MAX, "maximum", torch.maximum),
    (ReduceOp.BAND, "bitwise and", torch.bitwise_and),
    (ReduceOp.BOR, "bitwise or", torch.bitwise_or),
    (ReduceOp.BXOR, "bitwise xor", torch.bitwise_xor),
)


class Messages(Protocol):
    """Carries messages between both ranks. Thread-safe."""

    @property
    def peer(self) -> str:
        """The other rank's name in messages."""

    def send(self, address: Address, operation: str, data: bytes) -> None:
        """Sends one message; raises SparkError if the session is over."""

    def take(self, address: Address, operation: str, timeout: float) -> bytearray:
        """Waits for a message, and removes it.

        Raises:
            TimeoutError: it has not come within `timeout` seconds.
            SparkError: the session is over, or the other rank runs another operation.
        """

    def has(self, address: Address) -> bool:
        """True if a message has arrived, or never will: `take` returns or raises without a wait."""

    def end_session(self, reason: SparkError) -> None:
        """Ends the session on this rank."""


class PairWork(Work):  # type: ignore[misc]
    """An operation that has sent this rank's part, and ends once the other rank's message has arrived. Thread-safe.

    Like torch's, it ends once: each later call of `wait` returns, or raises the same error, at once.

    Args:
        arrived: whether it has arrived, or never will.
        finish: waits for it, at most the given number of seconds, and stores it in `results`; None if the operation has
            ended already.
        results: the tensors that hold the outcome.
        source: the rank that a received message comes from.
    """

    def __init__(
        self,
        results: list[torch.Tensor],
        arrived: Callable[[], bool] | None = None,
        finish: Callable[[float | None], None] | None = None,
        source: int = -1,
    ) -> None:
        super().__init__()
        self._results, self._arrived, self._finish, self._source = results, arrived, finish, source
        self._error: Exception | None = None
        self._lock = threading.Lock()  # held by the one thread that waits

    def wait(self, timeout: timedelta = _UNSET) -> bool:
        """Waits for the end of the operation.

        Raises:
            SparkError: the session is over, the ranks run different operations, or the time-out is over.
        """
        with self._lock:
            if self._finish is not None:
                try:
                    self._finish(timeout.total_seconds() if timeout > _UNSET else None)
                except Exception as error:
                    self._error = error
                self._finish = None  # not after an interrupt: then it can be waited for again
        if self._error is not None:
            raise self._error.with_traceback(None)
        return True

    def synchronize(self) -> None:
        """As `wait`."""
        self.wait()

    def is_completed(self) -> bool:
        """True once the operation has ended: its outcome is in the tensors, or `wait` raises why not."""
        if self._finish is not None and (self._arrived is None or self._arrived()):
            with contextlib.suppress(Exception):  # `wait` raises it
                self.wait()
        return self._finish is None

    def is_success(self) -> bool:
        """True once the operation has ended without an error."""
        return self.is_completed() and self._error is None

    def result(self) -> list[torch.Tensor]:
        """The tensors that hold the outcome."""
        self.wait()
        return self._results

    def source_rank(self) -> int:
        """The rank that a received message came from."""
        return self._source

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """A future that is done: waits for the operation first."""
        future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
        future.set_result(self.result())
        return future


class PairGroup(ProcessGroup):  # type: ignore[misc]
    """A process group of both ranks, or of one.

    A rank sends its part when an operation is called, and receives the other's when the operation is waited for.

    Args:
        messages: carries the group's messages.
        name: the group's, the same on both ranks.
        rank, size: this rank in the group, and the group's size.
        timeout: how long an operation waits for the other rank by default.
    """

    def __init__(self, messages: Messages, name: str, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        if size > WORLD_SIZE:
            raise SparkError(f"process group {name} has {size} ranks; a pair has {WORLD_SIZE}")
        self._link, self._label, self._own, self._peer = messages, name, rank, 1 - rank
        self._alone = size == 1
        self._limit = timeout
        self._numbers = itertools.count()
        self._streams: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)

    def getBackendName(self) -> str:
        """torch's name of this backend."""
        return BACKEND

    @property
    def group_name(self) -> str:
        """The name under which torch registers the group. (torch's own asks a backend, and here there is none.)"""
        return self._label

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets how long an operation waits for the other rank by default."""
        self._limit = timeout

    def broadcast(self, tensors: Tensors, opts: Any) -> Work:
        """Copies the root's tensors to the other rank."""
        mine = opts.rootRank == self._own
        return self._collective("broadcast", opts, send=tensors if mine else None, receive=None if mine else tensors)

    def allreduce(self, tensors: Tensors, opts: Any) -> Work:
        """Reduces both ranks' tensors in place, in rank order."""
        name, reduction = _reduction(opts.reduceOp)
        return self._collective(f"all_reduce ({name})", opts, send=tensors, receive=tensors, reduction=reduction)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Tensors, opts: Any) -> Work:
        """As `allreduce`, on the root alone."""
        name, reduction = _reduction(opts.reduceOp)
        mine = opts.rootRank == self._own
        return self._collective(
            f"reduce ({name})",
            opts,
            send=None if mine else tensors,
            receive=tensors if mine else None,
            reduction=reduction,
        )

    def allgather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> Work:
        """Gives both ranks both inputs, in rank order."""
        for parts, mine in zip(outputs, inputs, strict=True):
            _copy(parts[self._own], mine)
        theirs = [] if self._alone else [parts[self._peer] for parts in outputs]
        return self._collective("all_gather", opts, send=inputs, receive=theirs)

    def allgather_coalesced(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> Work:
        """As `allgather`, with outputs by rank and then by input."""
        return self.allgather([list(parts) for parts in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single(self, output: torch.Tensor, own: torch.Tensor, opts: Any = None) -> Work:
        """As `allgather`, into one tensor."""
        return self.all_gather_single_coalesced([output], [own], opts)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        """Several `all_gather_single` at once."""
        flat = [own.reshape(-1) for own in inputs]
        return self.allgather([self._parts(output) for output in outputs], flat, opts)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Work:
        """Gives the root both inputs, in rank order."""
        if opts.rootRank != self._own:
            return self._collective("gather", opts, send=inputs, receive=None)
        for parts, mine in zip(outputs, inputs, strict=True):
            _copy(parts[self._own], mine)
        theirs = [] if self._alone else [parts[self._peer] for parts in outputs]
        return self._collective("gather", opts, send=None, receive=theirs)

    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any) -> Work:
        """Gives each rank its part of the root's inputs."""
        if opts.rootRank != self._own:
            return self._collective("scatter", opts, send=None, receive=outputs)
        for output, parts in zip(outputs, inputs, strict=True):
            _copy(output, parts[self._own])
        theirs = [] if self._alone else [parts[self._peer] for parts in inputs]
        return self._collective("scatter", opts, send=theirs, receive=None)

    def reduce_scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any) -> Work:
        """Gives each rank the reduction of its parts of both ranks' inputs."""
        name, reduction = _reduction(opts.reduceOp)
        for output, parts in zip(outputs, inputs, strict=True):
            _copy(output, parts[self._own])
        theirs = [] if self._alone else [parts[self._peer] for parts in inputs]
        return self._collective(f"reduce_scatter ({name})", opts, send=theirs, receive=outputs, reduction=reduction)

    def reduce_scatter_single(self, output: torch.Tensor, whole: torch.Tensor, opts: Any) -> Work:
        """As `reduce_scatter`, from one tensor."""
        return self.reduce_scatter_single_coalesced([output], [whole], opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any) -> Work:
        """Several `reduce_scatter_single` at once."""
        flat = [output.view(-1) for output in outputs]
        return self.reduce_scatter(flat, [self._parts(whole) for whole in inputs], opts)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        """Gives each rank its input of both ranks."""
        _copy(outputs[self._own], inputs[self._own])
        if self._alone:
            return PairWork(outputs)
        return self._collective("all_to_all", opts, send=[inputs[self._peer]], receive=[outputs[self._peer]])

    def all_to_all_single(
        self,
        output: torch.Tensor,
        whole: torch.Tensor,
        output_sizes: list[int] | None,
        input_sizes: list[int] | None,
        opts: Any = None,
    ) -> Work:
        """As `alltoall`, with tensors split along their first dimension, evenly or by the given sizes."""
        count = 1 if self._alone else WORLD_SIZE
        return self.alltoall(
            list(output.split(output_sizes) if output_sizes else output.tensor_split(count)),
            list(whole.split(input_sizes) if input_sizes else whole.tensor_split(count)),
            opts,
        )

    alltoall_base = all_to_all_single

    def barrier(self, opts: Any = None) -> Work:
        """Ends once the other rank has called it too."""
        return self._collective("barrier", opts, send=[], receive=[])

    def send(self, tensors: Tensors, destination: int, tag: int = 0) -> Work:
        """Sends tensors to the other rank, which receives them with the same tag."""
        address = self._message(self._own, destination, tag)
        self._link.send(address, "send", _bytes_of(tensors))
        return PairWork(tensors)

    def recv(self, tensors: Tensors, source: int, tag: int = 0) -> Work:
        """Receives tensors that the other rank sends with the same tag."""
        return self._receiving(self._message(source, self._own, tag), "send", tensors, None, None, source)

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> Work:
        """As `recv`: there is one other rank."""
        return self.recv(tensors, self._peer, tag)

    def _parts(self, whole: torch.Tensor) -> Tensors:
        """One part of the elements for each rank."""
        return list(whole.view(-1).chunk(1 if self._alone else WORLD_SIZE))

    def _message(self, source: int, destination: int, tag: int) -> Address:
        if self._alone or source == destination:
            raise SparkError(f"rank {self._own} of process group {self._label} cannot send to itself")
        stream = f"rank {source} to {destination}, tag {tag}"
        return self._label, stream, next(self._streams[stream])

    def _collective(
        self,
        operation: str,
        opts: Any,
        *,
        send: Tensors | None,
        receive: Tensors | None,
        reduction: Reduction | None = None,
    ) -> Work:
        """Sends and receives at most one message, of the group's next number."""
        if self._alone:
            return PairWork(receive or send or [])
        address = self._label, _COLLECTIVES, next(self._numbers)
        if send is not None:
            self._link.send(address, operation, _bytes_of(send))
        if receive is None:
            return PairWork(send or [])
        return self._receiving(address, operation, receive, reduction, getattr(opts, "timeout", None), self._peer)

    def _receiving(
        self,
        address: Address,
        operation: str,
        targets: Tensors,
        reduction: Reduction | None,
        limit: timedelta | None,
        source: int,
    ) -> Work:
        usual = self._limit if limit is None or limit <= _UNSET else limit

        def finish(seconds: float | None) -> None:
            seconds = usual.total_seconds() if seconds is None else seconds
            try:
                data = self._link.take(address, operation, seconds)
            except TimeoutError:
                raise PeerTimeoutError(
                    f"the other rank ({self._link.peer}) did not call {operation}, operation {address[2]} of "
                    f"process group {self._label}, within {seconds:g} s"
                ) from None
            self._put(data, targets, operation, reduction)

        return PairWork(targets, lambda: self._link.has(address), finish, source)

    def _put(self, data: bytearray, targets: Tensors, operation: str, reduction: Reduction | None) -> None:
        expected = sum(target.nbytes for target in targets)
        if len(data) != expected:
            raise SparkError(
                f"{operation} in process group {self._label} moves {expected} bytes here and {len(data)} on the other "
                f"rank ({self._link.peer})"
            )
        with torch.inference_mode():
            for target, theirs in zip(targets, _tensors_of(data, targets), strict=True):
                if reduction is None:
                    target.copy_(theirs)
                else:
                    target.copy_(reduction(target, theirs) if self._own < self._peer else reduction(theirs, target))


_messages: Messages | None = None
_longest = timedelta.max


def use_messages(messages: Messages | None, longest: timedelta = timedelta.max) -> None:
    """Sets the carrier of messages for this process's groups of this kind; None after the session.

    Args:
        messages: the carrier.
        longest: how long an operation waits for the other rank at most by default (torch's default is half an hour).
    """
    global _messages, _longest
    _messages, _longest = messages, longest
    if BACKEND not in Backend.backend_list:
        Backend.register_backend(BACKEND, _make, extended_api=True, devices=["cpu"])


def pair_is_up() -> bool:
    """True while this process has a session, and so a carrier of messages for groups of this kind."""
    return _messages is not None


@contextmanager
def instead_of_gloo() -> Iterator[None]:
    """A context in which `torch.distributed.new_group` makes groups of this kind instead of gloo's."""
    original = torch.distributed.new_group

    def new_group(*args: Any, backend: Any = None, **kwargs: Any) -> Any:
        return original(*args, backend=BACKEND if backend == Backend.GLOO else backend, **kwargs)

    torch.distributed.new_group = new_group
    try:
        yield
    finally:
        torch.distributed.new_group = original


@contextmanager
def connecting(what: str, seconds: float) -> Iterator[None]:
    """Ends the session if the body, in which `what` connects both ranks on its own, takes more than `seconds`.

    The body cannot be interrupted, but the engine's process can be ended.
    """

    def end_session() -> None:
        if _messages is not None:
            _messages.end_session(
                PeerLostError(
                    f"{what} did not connect to the other rank within {seconds:g} s; it uses random TCP ports: "
                    "allow all traffic on the link in the firewalls of both machines"
                )
            )

    timer = threading.Timer(seconds, end_session)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if timer is not threading.current_thread():
            timer.join()


def _make(options: Any, _: Any) -> PairGroup:
    if _messages is None:
        raise SparkError(f"process groups of the kind {BACKEND!r} exist only while a pair is up")
    timeout = min(options.timeout, _longest)
    return PairGroup(_messages, options.group_id, options.group_rank, options.group_size, timeout)


def _reduction(asked: Any) -> tuple[str, Reduction]:
    for kind, name, reduction in _REDUCTIONS:
        if asked == kind:
            return name, reduction
    raise SparkError(f"process groups of a pair do not support the reduction {asked}")


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.inference_mode():
        target.copy_(source)


def _bytes_of(tensors: Tensors) -> bytes:
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise SparkError(f"a tensor on {tensor.device} was given to a process group for the CPU")
    return b"".join(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)


def _tensors_of(data: bytearray, like: Tensors) -> Iterator[torch.Tensor]:
    begin = 0
    for tensor in like:
        if not tensor.numel():
            yield torch.empty_like(tensor)
            continue
        part = torch.frombuffer(data, dtype=torch.uint8, count=tensor.nbytes, offset=begin)
        # A copy is aligned for its type.
        yield (part.clone() if begin else part).view(tensor.dtype).view(tensor.shape)
        begin += tensor.nbytes
