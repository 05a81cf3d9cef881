"""How a runtime is set up. Both ranks must use the same options."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from vllm_spark._native import MAX_DEPTH
from vllm_spark.collective.errors import UsageError


@dataclass(frozen=True)
class LaunchShape:
    """How many threads and blocks a collective gets. The defaults are the best of an H100 (benchmarks/NOTES.md).

    `vllm-spark bench calibrate` finds those of another GPU. Impossible ones raise UsageError.
    """

    packet_threads: int = 288
    """Flagged packets: most threads of a block, a multiple of 32 up to 544; each sends a packet of 8 bytes, or several
    of a message that needs more than 64 such blocks. 4 KiB and its header are 513 packets."""
    payload_threads: int = 256
    """Payload, then flag: most threads of a block that send, a multiple of 32 up to 256; as many receive."""
    payload_blocks: int = 32
    """Payload, then flag: most blocks, 1 to 64; of more than the GPU has multiprocessors (48 on a GB10), so many."""
    payload_bytes_per_block: int = 4096
    """Payload, then flag: a block gets at least this much."""
    payload_message_bytes: int = 1 << 17
    """Payload, then flag: more than this goes in several messages, 16 or so if slots are large enough; the first arrive
    while the last are still sent."""
    dependent_launch: bool = True
    """Starts a kernel while the one before it on the stream still runs (compute capability 9.0 and later)."""

    def __post_init__(self) -> None:
        for name, lowest, highest, step in (
            ("packet_threads", 32, 544, 32),
            ("payload_threads", 32, 256, 32),
            ("payload_blocks", 1, 64, 1),
            ("payload_bytes_per_block", 16, 1 << 20, 16),
            ("payload_message_bytes", 1 << 10, 1 << 30, 16),
        ):
            value = getattr(self, name)
            if not lowest <= value <= highest or value % step:
                raise UsageError(f"{name} {value} does not do; it goes from {lowest} to {highest} in steps of {step}")


KIB = 1 << 10
MIB = 1 << 20


Transport = Literal["loopback", "verbs"]
"""How data reaches the peer: `loopback` is shared memory between two processes of one machine, `verbs` RDMA."""


@dataclass(frozen=True)
class RuntimeOptions:
    """Options of a runtime; impossible ones raise UsageError."""

    transport: Transport = "loopback"
    loopback_mode: Literal["direct", "proxied"] = "direct"
    """`direct`: the caller stores into the peer's memory; `proxied`: a proxy thread does, as it does for a NIC."""
    wire_latency_us: float = 0.0
    """Proxied only: latency of the modelled wire in microseconds, 0 or more."""
    wire_gbytes_per_s: float = 0.0
    """Proxied only: bandwidth of the modelled wire in GB/s; 0 is unlimited."""
    rails: tuple[str, ...] = ()
    """Verbs only: ports of this machine to use, each `DEVICE`, `DEVICE:PORT` or `DEVICE:PORT:GID_INDEX`; may differ
    between the ranks. Empty: every active port that is in one network with one of the peer's."""
    link_timeout_s: float = 30.0
    """Verbs only: seconds without any working rail after which both ranks stop, more than 0."""
    traffic_class: int = 0
    """Verbs only: traffic class of the packets, 0 to 255."""
    service_level: int = 0
    """Verbs only: service level of the packets, 0 to 15."""
    slot_bytes: int = 1 * MIB
    """Bytes of one payload slot, a multiple of 64; larger messages go in chunks of this size."""
    packet_bytes: int | None = None
    """Messages up to this many bytes go as flagged packets; 0 to `slot_bytes`. None: what the runtime finds best."""
    depth: int = 4
    """Chunks in flight, a power of two up to 64; there are twice as many slots."""
    timeout_s: float = 600.0
    """Seconds that one message may take to come, more than 0."""
    first_sequence: int = 1
    """Sequence number of the first message, a 32-bit number (for tests of its wrap-around)."""
    largest_message: int = 64 * MIB
    """Bytes of the largest input that a collective takes."""
    launch: LaunchShape = field(default_factory=LaunchShape)
    """Of collectives on CUDA tensors."""

    def __post_init__(self) -> None:
        if self.transport not in ("loopback", "verbs"):
            raise UsageError(f"transport {self.transport!r} does not exist; use 'loopback' or 'verbs'")
        if self.transport == "verbs" and (self.wire_latency_us or self.wire_gbytes_per_s):
            raise UsageError("a modelled wire is for the transport 'loopback'; 'verbs' has a real one")
        if self.loopback_mode not in ("direct", "proxied"):
            raise UsageError(f"loopback_mode {self.loopback_mode!r} does not exist; use 'direct' or 'proxied'")
        if not self.proxied and (self.wire_latency_us or self.wire_gbytes_per_s):
            raise UsageError("a modelled wire needs loopback_mode='proxied'; with 'direct' there is none")
        if self.slot_bytes % 64:
            raise UsageError(f"slot_bytes {self.slot_bytes} is not a multiple of 64")
        if self.depth & (self.depth - 1):
            raise UsageError(f"depth {self.depth} is not a power of two; use 1, 2, 4, 8, 16, 32 or 64")
        for name, lowest, highest in (
            ("wire_latency_us", 0.0, 1e9),
            ("wire_gbytes_per_s", 0.0, 1e6),
            ("link_timeout_s", 1e-3, 1e6),
            ("traffic_class", 0, 255),
            ("service_level", 0, 15),
            ("slot_bytes", 64, 1 << 30),
            ("packet_bytes", 0, self.slot_bytes),
            ("depth", 1, MAX_DEPTH),
            ("timeout_s", 1e-3, 1e6),
            ("first_sequence", 0, (1 << 32) - 1),
            ("largest_message", 1, 64 * MIB),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not lowest <= value <= highest:
                raise UsageError(f"{name} {value} is out of range; it goes from {lowest} to {highest}")

    @property
    def proxied(self) -> bool:
        """True if messages go through the proxy thread."""
        return self.transport == "verbs" or self.loopback_mode == "proxied"

    def agreement(self) -> dict[str, str]:
        """Every option as text, for comparison with the peer's."""
        options = asdict(self)
        options |= options.pop("launch")  # also the shape: both ranks must cut a message into the same pieces
        del options["rails"]  # names of this machine
        return {name: str(value) for name, value in options.items()}
