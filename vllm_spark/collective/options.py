"""How a runtime is set up. Both ranks must use the same options."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from vllm_spark._native import MAX_DEPTH
from vllm_spark.collective.errors import UsageError
from vllm_spark.collective.launch import LaunchShape

KIB = 1 << 10
MIB = 1 << 20


@dataclass(frozen=True)
class RuntimeOptions:
    """Options of a runtime; impossible ones raise UsageError."""

    transport: Literal["loopback"] = "loopback"
    """How data reaches the peer; `loopback` is shared memory between two processes of one machine."""
    loopback_mode: Literal["direct", "proxied"] = "direct"
    """`direct`: the caller stores into the peer's memory; `proxied`: a proxy thread does, as it does for a NIC."""
    wire_latency_us: float = 0.0
    """Proxied only: latency of the modelled wire in microseconds, 0 or more."""
    wire_gbytes_per_s: float = 0.0
    """Proxied only: bandwidth of the modelled wire in GB/s; 0 is unlimited."""
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
        if self.transport != "loopback":
            raise UsageError(f"transport {self.transport!r} does not exist in this version; use 'loopback'")
        if self.loopback_mode not in ("direct", "proxied"):
            raise UsageError(f"loopback_mode {self.loopback_mode!r} does not exist; use 'direct' or 'proxied'")
        if self.loopback_mode == "direct" and (self.wire_latency_us or self.wire_gbytes_per_s):
            raise UsageError("a modelled wire needs loopback_mode='proxied'; with 'direct' there is none")
        if self.slot_bytes % 64:
            raise UsageError(f"slot_bytes {self.slot_bytes} is not a multiple of 64")
        if self.depth & (self.depth - 1):
            raise UsageError(f"depth {self.depth} is not a power of two; use 1, 2, 4, 8, 16, 32 or 64")
        for name, lowest, highest in (
            ("wire_latency_us", 0.0, 1e9),
            ("wire_gbytes_per_s", 0.0, 1e6),
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
    def path(self) -> str:
        """What messages take, in words: `loopback, direct`."""
        return f"{self.transport}, {self.loopback_mode}"

    def agreement(self) -> dict[str, str]:
        """Every option as text, for comparison with the peer's."""
        options = asdict(self)
        options |= options.pop("launch")  # also the shape: both ranks must cut a message into the same pieces
        return {name: str(value) for name, value in options.items()}
