"""The runtime of one rank for CPU tensors, and its base for other devices."""

from __future__ import annotations

import math
import os
import weakref
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_spark import _native
from vllm_spark.collective.errors import CollectiveError, UsageError
from vllm_spark.collective.link_thread import Announce, LinkThread
from vllm_spark.collective.options import KIB, RuntimeOptions
from vllm_spark.collective.rails import Rail, local_ports, pair
from vllm_spark.collective.rendezvous import (
    Address,
    Exchange,
    LinkOffer,
    Ports,
    Terms,
    agree,
    both_ready,
    machine_identity,
    swap_addresses,
    swap_offers,
    swap_ports,
)
from vllm_spark.ranks import WORLD_SIZE

if TYPE_CHECKING:
    import torch

    from vllm_spark.collective.link_model import WireFigures


@dataclass(frozen=True)
class Counters:
    """The counters of a runtime; bytes are those of this rank's inputs."""

    all_reduces: int
    all_reduce_bytes: int
    all_gathers: int
    all_gather_bytes: int
    packet_messages: int
    payload_messages: int
    chunked_operations: int
    wait_seconds: float
    proxy_posts: int
    proxy_coalesced: int
    rails_up: int
    """Rails in use for data now; this and the nine below are for verbs and for a modelled link."""
    rail_failures: int
    """Failures of a rail that was in use for data."""
    rail_recoveries: int
    """Recoveries of such a rail."""
    rail_proof_failures: int
    """Connections of a rail that failed before both ranks had a full-size message acknowledged over them."""
    reposts: int
    """Messages sent again because a rail failed before they were known to have arrived."""
    rail_posts: tuple[int, ...]
    """Messages sent over each rail, or parts of one."""
    rail_bytes: tuple[int, ...]
    """Their bytes: of payloads, or of packets with their flags."""
    rail_doorbells: tuple[int, ...]
    """How often the proxy rang each rail's doorbell: once for all that it had found staged in one look."""
    rail_states: tuple[str, ...]
    """The state of each rail: `open` (in use for data), `unproven`, `held down` (hold-down) or `down`."""
    link_lost: bool
    """True while no rail is open; at the start too, for the milliseconds until one is proven."""
    last_sequence: int


class OperationRecord(NamedTuple):
    """A collective on CPU tensors that was recorded; times are `time.monotonic_ns()`.

    Attributes:
        kind: `all_reduce` or `all_gather`.
        bytes: of this rank's input.
        sequence: of its first message.
        messages: that it was cut into.
        packets: whether it used the LL protocol, else Simple.
        start: when it was called.
        sent: when this rank's first messages were staged, or stored in the peer's memory.
        wait: when it first found that the peer's message had not arrived; 0 if it had.
        arrived: when the peer's last message had arrived.
        end: when the result was complete.
        waited: nanoseconds that it waited for the peer.
    """

    kind: str
    bytes: int
    sequence: int
    messages: int
    packets: bool
    start: int
    sent: int
    wait: int
    arrived: int
    end: int
    waited: int


class PostRecord(NamedTuple):
    """A message, or a part of one, that the proxy posted to the transport while it was recorded.

    Attributes:
        sequence: of the message.
        piece: of its payload; 0 with the LL protocol.
        bytes: with the flags of packets.
        packets: whether it uses the LL protocol.
        time: when it was posted, `time.monotonic_ns()`.
    """

    sequence: int
    piece: int
    bytes: int
    packets: bool
    time: int


class RuntimeRecords(NamedTuple):
    """What a runtime recorded: collectives (none on a GPU), posted messages (none without a proxy).

    Attributes:
        operations: in the order of their calls.
        posts: in the order of their times.
        lost: how many more there were than had room.
    """

    operations: list[OperationRecord]
    posts: list[PostRecord]
    lost: int


class Runtime:
    """Collectives on CPU tensors with one peer. Made by `connect`; both ranks call the same ones in the same order.

    Not for several threads at once, because the order would be undefined: the second caller gets a UsageError.
    """

    device = "cpu"
    """The type of the torch device whose tensors it accepts."""

    def __init__(self, native: Any, rank: int, options: RuntimeOptions, link_thread: LinkThread | None = None) -> None:
        self._native = native
        self._link_thread = link_thread
        # Also without a call of `close`: the link's thread holds the native runtime, and the peer would wait for it.
        self._release = weakref.finalize(self, _release, os.getpid(), native, link_thread)
        self.rank = rank
        self.world_size = WORLD_SIZE
        self.options = options
        self.rails: tuple[Rail, ...] = ()
        """This rank's ends of the rails; empty without verbs."""

    @classmethod
    def connect(
        cls,
        rank: int,
        world_size: int,
        exchange: Exchange,
        options: RuntimeOptions | None = None,
        description: str = "",
        announce: Announce | None = None,
    ) -> Runtime:
        """Connects this rank with its peer.

        Args:
            rank: 0 or 1.
            world_size: 2; other sizes are refused.
            exchange: sends this rank's bytes to the peer and returns the peer's; called a few times on both ranks.
            options: the same on both ranks.
            description: this rank's name in the peer's messages, such as a host name.
            announce: required for verbs: sends bytes to the peer at any later time, from a thread of the runtime's; the
                peer passes them to its runtime's `deliver`. The ranks need it to reconnect when no rail works.

        Raises:
            UsageError: an invalid rank, size or option.
            AgreementError: the ranks have different settings; raised on both.
            CollectiveError: the peer's memory cannot be reached.
        """
        if world_size != WORLD_SIZE:
            raise UsageError(f"world size {world_size} is not supported; this runtime connects {WORLD_SIZE} ranks")
        options = cls._completed(options or RuntimeOptions())
        if options.transport == "verbs" and announce is None:
            raise UsageError("verbs needs an out-of-band path to the peer; give `announce`")
        own = {"device": cls.device, **options.agreement()}
        peer = agree(exchange, Terms(rank, world_size, description, own))
        if announce is not None and options.transport == "verbs":
            native, rails = cls._connect_rails(rank, exchange, options, peer.description)
            link_thread = LinkThread(native, announce)
            link_thread.start()
            runtime = cls(native, rank, options, link_thread)
            runtime.rails = tuple(rails)
            return runtime
        return cls(cls._connect_memory(rank, exchange, options, peer.description), rank, options)

    @classmethod
    def _connect_memory(cls, rank: int, exchange: Exchange, options: RuntimeOptions, peer: str) -> Any:
        """The native runtime, connected to a peer on this machine."""
        native = cls._make_native(rank, options, options.stripes)
        process, descriptor, *nonce = native.address()
        address = Address(machine_identity(), process, descriptor, (hex(nonce[0]), hex(nonce[1])))
        theirs = swap_addresses(exchange, address)
        problem = ""
        try:
            first, second = (int(part, 16) for part in theirs.nonce)
            native.connect(theirs.process, theirs.descriptor, first, second, peer)
        except CollectiveError as error:
            problem = str(error)
        both_ready(exchange, problem)
        return native

    @classmethod
    def _connect_rails(
        cls, rank: int, exchange: Exchange, options: RuntimeOptions, peer: str
    ) -> tuple[Any, list[Rail]]:
        """The native runtime, connected over every rail to a peer on another machine, and this rank's ends of them."""
        mine = _ports(options)
        theirs = swap_ports(exchange, mine)
        rails = pair(mine.ports, theirs, rank)
        native, offer = cls._open_rails(rank, options, rails)
        peer_offer = swap_offers(exchange, offer)
        problem = ""
        try:
            native.connect_link(peer_offer, peer)
        except CollectiveError as error:
            problem = str(error)
        both_ready(exchange, problem)
        native.start()
        return native, rails

    @classmethod
    def _open_rails(cls, rank: int, options: RuntimeOptions, rails: list[Rail]) -> tuple[Any, LinkOffer]:
        """The native runtime, with its memory registered for every rail, and what the peer needs to connect."""
        native = cls._make_native(rank, options, stripes=len(rails))
        try:
            return native, open_link(native, options, rails)
        except CollectiveError as error:
            return native, LinkOffer(problem=str(error))

    @classmethod
    def pin(cls, rank: int, options: RuntimeOptions, rails: list[Rail]) -> int:
        """Registers memory of a runtime's size for each of `rails`, in the order of `connect`, and releases it again.

        Returns:
            The size of that memory in bytes.

        Raises:
            CollectiveError: a device does not open, or the memory cannot be registered with it.
        """
        options = cls._completed(options)
        native, offer = cls._open_rails(rank, options, rails)
        native.close()
        if offer.problem:
            raise CollectiveError(offer.problem)
        return region_bytes(options)

    @classmethod
    def _make_native(cls, rank: int, options: RuntimeOptions, stripes: int) -> Any:
        return _native.Runtime(native_options(rank, options, stripes))

    @classmethod
    def _completed(cls, options: RuntimeOptions) -> RuntimeOptions:
        """`options` within the limits of this device, and with its default for `packet_bytes`."""
        options = cls._limited_to_device(options)
        if options.packet_bytes is not None:
            return options
        return replace(options, packet_bytes=min(cls._default_packet_bytes(options), options.slot_bytes))

    @classmethod
    def _limited_to_device(cls, options: RuntimeOptions) -> RuntimeOptions:
        """`options` within the limits of this device, before both ranks compare them."""
        return options

    @classmethod
    def _default_packet_bytes(cls, options: RuntimeOptions) -> int:
        """The largest message for which the LL protocol is faster (benchmarks/NOTES.md, entry 3)."""
        return 8 * KIB

    def accepts_all_reduce(self, tensor: torch.Tensor) -> bool:
        """True if `all_reduce` supports this tensor: on `device`, float32, float16 or bfloat16, of at most 64 MiB."""
        return _dtypes().get(tensor.dtype) is not None and self._accepts(tensor)

    def accepts_all_gather(self, tensor: torch.Tensor, dim: int = -1) -> bool:
        """True if `all_gather` supports this tensor: on `device`, of any plain dtype, of at most 64 MiB."""
        return -tensor.dim() <= dim < tensor.dim() and self._accepts(tensor)

    def all_reduce(self, tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of both ranks' tensors, added in float32 in rank order: bit-identical on both ranks.

        Args:
            tensor: any shape and strides; float32, float16 or bfloat16; the same shape and dtype on both ranks.
            out: the tensor for the sum, contiguous and of the same shape and dtype; `tensor` itself, or not overlapping
                it. A new contiguous tensor by default.

        Raises:
            UsageError: a tensor that `accepts_all_reduce` does not accept.
            CollectiveError: the peer failed, stopped, or called another collective; the runtime is unusable then.
        """
        import torch

        dtype = _dtypes().get(tensor.dtype)
        if dtype is None or not self._accepts(tensor):
            raise UsageError(
                f"all_reduce does not support {_describe(tensor)}; it supports float32, float16 and bfloat16 on "
                f"{self.device}, up to {self.options.largest_message} bytes"
            )
        source = self._readable(tensor)
        if out is None:
            out = torch.empty_like(source)
        elif out.shape != tensor.shape or out.dtype != tensor.dtype or not out.is_contiguous():
            raise UsageError(
                f"all_reduce cannot write the sum of {_describe(tensor)} into {_describe(out)}; give one that matches"
            )
        elif 0 < abs(out.data_ptr() - source.data_ptr()) < source.nbytes:
            raise UsageError(
                f"all_reduce cannot write the sum of {_describe(tensor)} into an overlapping `out`; give the tensor "
                "itself, or one that does not overlap it"
            )
        self._run_all_reduce(source, out, dtype)
        return out

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Both ranks' tensors, concatenated along `dim` in rank order, as a new contiguous tensor.

        Raises:
            UsageError: a tensor that `accepts_all_gather` does not accept.
            CollectiveError: the peer failed, stopped, or called something else; the runtime is unusable then.
        """
        if not self.accepts_all_gather(tensor, dim):
            raise UsageError(
                f"all_gather does not support {_describe(tensor)} along dimension {dim}; it supports tensors of at "
                f"least one dimension on {self.device}, up to {self.options.largest_message} bytes"
            )
        dim %= tensor.dim()
        source = self._readable(tensor)
        shape = list(source.shape)
        outer = math.prod(shape[:dim])
        shape[dim] *= self.world_size
        gathered = source.new_empty(shape)
        self._run_all_gather(source, gathered, outer)
        return gathered

    def check(self) -> None:
        """Raises the error of a failed collective, if there is one; results since then are invalid.

        Raises:
            CollectiveError: as the collectives.
        """
        if (reason := self.poisoned) is not None:
            raise CollectiveError(reason)

    def counters(self) -> Counters:
        """The counters so far."""
        values: dict[str, Any] = self._native.counters()
        return Counters(**values)

    def deliver(self, announcement: bytes) -> None:
        """Receives bytes that the peer's runtime gave to its `announce`. From any thread."""
        self._native.deliver(announcement)

    @property
    def path(self) -> str:
        """A description of the path of messages: `over loopback, direct`."""
        return str(self._native.path)

    @property
    def silence(self) -> float | None:
        """Seconds since the last announcement of the peer's proxy, over a rail or out of band; None without rails."""
        return None if self._link_thread is None else float(self._native.silence())

    @property
    def link_lost(self) -> bool:
        """True while no rail is open, and all messages wait for one."""
        return bool(self._native.counters()["link_lost"])

    def break_rail(self, rail: int) -> None:
        """Breaks the connection of a rail here, as a failure of its network card does; it is connected anew by itself.

        For checks of that. From any thread.
        """
        self._native.break_rail(rail)

    def wake_proxy(self) -> None:
        """Ends a rest of the proxy's thread: collectives are about to be launched, as by a replay of a CUDA graph.

        A proxy for CUDA tensors that had nothing to do for a second looks for messages once a millisecond. From any
        thread.
        """
        self._native.wake_proxy()

    def start_recording(self, capacity: int) -> None:
        """Records collectives and posted messages, the first `capacity` of each, until `stop_recording`."""
        self._native.start_recording(capacity)

    def stop_recording(self) -> RuntimeRecords:
        """Ends the recording, and returns it; empty if there was none."""
        operations, posts, lost = self._native.stop_recording()
        return RuntimeRecords(
            [OperationRecord(*record) for record in operations], [PostRecord(*record) for record in posts], lost
        )

    def abort(self, reason: str) -> None:
        """Ends every wait on both ranks with `reason`; the runtime is unusable then. From any thread."""
        self._native.abort(reason)

    def close(self) -> None:
        """Ends the peer's waits and that of another thread, and all threads; may be called again.

        It is called when the runtime is dropped, and at the process's end, too. In a fork it has no effect.
        """
        self._release()

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return bool(self._native.closed)

    @property
    def poisoned(self) -> str | None:
        """Why the runtime is unusable; None if it is not."""
        return str(self._native.poison) or None

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _readable(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` itself if the native module can read it in place, else a copy."""
        return tensor.contiguous()

    def _run_all_reduce(self, source: torch.Tensor, out: torch.Tensor, dtype: _native.DType) -> None:
        self._native.all_reduce(source.data_ptr(), out.data_ptr(), source.numel(), dtype)

    def _run_all_gather(self, source: torch.Tensor, out: torch.Tensor, outer: int) -> None:
        """`source` is [outer, inner] and `out` [outer, ranks, inner], both contiguous."""
        inner_bytes = source.numel() * source.element_size() // max(outer, 1)
        self._native.all_gather(source.data_ptr(), out.data_ptr(), outer, inner_bytes)

    def _accepts(self, tensor: torch.Tensor) -> bool:
        return bool(
            tensor.device.type == self.device
            and not tensor.is_sparse
            and not tensor.is_quantized
            and tensor.numel() * tensor.element_size() <= self.options.largest_message
        )


def region_bytes(options: RuntimeOptions) -> int:
    """Bytes of the memory that a rank shares with its peer, with the options of a runtime that was connected."""
    return _native.region_bytes(
        slot_bytes=options.slot_bytes, packet_bytes=options.packet_bytes or 0, depth=options.depth
    )


def _release(process: int, native: Any, link_thread: LinkThread | None) -> None:
    """Closes the native runtime of `process`; in a fork, which shares descriptors with it, nothing is done."""
    if os.getpid() != process:
        return
    native.close()
    if link_thread is not None:
        link_thread.stop()


def _ports(options: RuntimeOptions) -> Ports:
    try:
        return Ports(tuple(local_ports(options.rails)))
    except CollectiveError as error:
        return Ports(problem=str(error))


def native_options(rank: int, options: RuntimeOptions, stripes: int) -> _native.Options:
    """The options of both native runtimes; `stripes` is the number of rails, or 1."""
    assert options.packet_bytes is not None
    return _native.Options(
        rank=rank,
        slot_bytes=options.slot_bytes,
        packet_bytes=options.packet_bytes,
        depth=options.depth,
        proxied=options.proxied,
        stripes=stripes,
        wire=None if options.wire is None else _native_wire(options.wire),
        timeout_s=options.timeout_s,
        first_sequence=options.first_sequence,
        clear_interval=options.clear_interval,
        largest_message=options.largest_message,
    )


def open_link(native: Any, options: RuntimeOptions, rails: list[Rail]) -> LinkOffer:
    """Raises CollectiveError if a device does not open, or the memory cannot be registered with it."""
    return LinkOffer(
        native.open_link(
            rails=[tuple(rail) for rail in rails],
            timeout_s=options.link_timeout_s,
            rail_timeout_s=options.rail_timeout_s,
            traffic_class=options.traffic_class,
            service_level=options.service_level,
        )
    )


def _native_wire(wire: WireFigures) -> _native.WireFigures:
    return _native.WireFigures(
        rails=[(list(rail.latency), rail.gbytes_per_s) for rail in wire.rails],
        gbytes_per_s=wire.gbytes_per_s,
        doorbell_us=wire.posting.doorbell_us,
        work_request_us=wire.posting.work_request_us,
    )


_dtype_table: dict[Any, _native.DType] = {}


def _dtypes() -> dict[Any, _native.DType]:
    """The torch dtypes that `all_reduce` supports; created at first use, to import torch late."""
    if not _dtype_table:
        import torch

        _dtype_table.update(
            {
                torch.float32: _native.DType.FLOAT32,
                torch.float16: _native.DType.FLOAT16,
                torch.bfloat16: _native.DType.BFLOAT16,
            }
        )
    return _dtype_table


def _describe(tensor: torch.Tensor) -> str:
    return f"a {tuple(tensor.shape)} tensor of {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
