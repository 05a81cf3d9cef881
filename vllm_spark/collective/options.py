"""The options of a runtime (`RuntimeOptions`) and of its kernels (`LaunchShape`); the same on both ranks.

A message uses one of two protocols, by its size, with NCCL's names: **LL** (low latency), where every few bytes have a
flag, and **Simple**, where the flag follows the payload. docs/protocol.md describes both. Names of
options with `packet` are about LL, those with `payload` about Simple.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from vllm_spark.collective.errors import UsageError

if TYPE_CHECKING:
    from vllm_spark.collective.link_model import WireFigures

KIB = 1 << 10
MIB = 1 << 20

Transport = Literal["loopback", "verbs"]
"""The transport of data: `loopback` is shared memory between two processes of one machine, `verbs` RDMA."""


LoopbackMode = Literal["direct", "proxied"]
"""`direct`: the caller stores into the peer's memory; `proxied`: a proxy thread does, as for RDMA."""


@dataclass(frozen=True)
class LaunchShape:
    """Threads and blocks of a collective's kernel. The defaults are the best of an H100 (benchmarks/NOTES.md).

    `vllm-spark bench calibrate` measures those of another GPU. Invalid values raise UsageError.
    """

    packet_threads: int = 288
    """LL: maximum of threads in a block, a multiple of 32 up to 544; each sends a packet with 12 bytes of data, or
    several if the message needs more than 64 such blocks. 4 KiB and its header are 343 packets."""
    payload_threads: int = 256
    """Simple: maximum of sending threads in a block, a multiple of 32 up to 256; as many receive."""
    payload_blocks: int = 32
    """Simple: maximum of blocks, 1 to 64; limited to the GPU's number of multiprocessors (48 on a GB10)."""
    payload_bytes_per_block: int = 4096
    """Simple: minimum of bytes for each block."""
    payload_message_bytes: int = 1 << 17
    """Simple: larger inputs are sent in several messages, about 16 if slots are large enough; the first arrive while
    the last are still being sent."""
    dependent_launch: bool = True
    """Programmatic dependent launch: starts a kernel before the previous one has ended (compute capability 9.0 on)."""

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
                raise UsageError(f"{name} {value} is invalid: must be {lowest} to {highest} in steps of {step}")


PROXIED_SHAPE = LaunchShape(payload_blocks=8, payload_bytes_per_block=8 * KIB)
"""The default with a proxy, which posts every piece by itself: fewer and larger ones than without (benchmarks/NOTES.md,
entry 17)."""


@dataclass(frozen=True)
class RuntimeOptions:
    """Options of a runtime.

    Invalid combinations raise UsageError here, and invalid sizes, depths and time-outs when the native runtime is made.
    Ranges of the user's settings are checked by `SparkConfig`.
    """

    transport: Transport = "loopback"
    loopback_mode: LoopbackMode = "direct"
    wire: WireFigures | None = None
    """Loopback, proxied: the modelled link; None: messages arrive when the proxy has copied them."""
    rails: tuple[str, ...] = ()
    """Verbs only: ports of this machine to use, each `DEVICE`, `DEVICE:PORT` or `DEVICE:PORT:GID_INDEX`; may differ
    between the ranks. Empty: every active port that is in one network with one of the peer's."""
    link_timeout_s: float = 30.0
    """Verbs only: seconds without any working rail after which both ranks stop, more than 0."""
    rail_timeout_s: float = 0.5
    """Verbs only: seconds without an acknowledgement after which a rail fails, more than 0; NICs use the next lower of
    0.47 s times a power of two, and may take up to four times as long."""
    traffic_class: int = 0
    """Verbs only: traffic class of the packets, 0 to 255."""
    service_level: int = 0
    """Verbs only: service level of the packets, 0 to 15."""
    slot_bytes: int = 1 * MIB
    """Bytes of one payload slot, a multiple of 64; larger messages are sent in chunks of this size."""
    packet_bytes: int | None = None
    """Messages up to this many bytes use the LL protocol; 0 to `slot_bytes`. None: the runtime's default."""
    depth: int = 4
    """Window: chunks in flight, a power of two up to 64; there are twice as many slots."""
    timeout_s: float = 600.0
    """Seconds to wait for one message, more than 0."""
    first_sequence: int = 1
    """Sequence number of the first message, a 32-bit number (for tests of its wrap-around)."""
    clear_interval: int = 1 << 30
    """Messages between two clearings of a slot, a power of two from the number of slots to 2^30 (less for tests)."""
    largest_message: int = 64 * MIB
    """Bytes of the largest supported input of a collective."""
    launch: LaunchShape | None = None
    """For collectives on CUDA tensors; None: the runtime's default."""

    def __post_init__(self) -> None:
        if self.transport not in ("loopback", "verbs"):
            raise UsageError(f"transport {self.transport!r} does not exist; use 'loopback' or 'verbs'")
        if self.transport == "verbs" and self.wire is not None:
            raise UsageError("a modelled wire is for the transport 'loopback'; 'verbs' has a real one")
        if self.loopback_mode not in ("direct", "proxied"):
            raise UsageError(f"loopback_mode {self.loopback_mode!r} does not exist; use 'direct' or 'proxied'")
        if not self.proxied and self.wire is not None:
            raise UsageError("a modelled wire needs loopback_mode='proxied'; with 'direct' there is none")
        if not 1 <= self.largest_message <= 64 * MIB:
            raise UsageError(f"largest_message {self.largest_message} is invalid: must be 1 to {64 * MIB}")
        if not 0 <= self.first_sequence < 1 << 32:
            raise UsageError(f"first_sequence {self.first_sequence} is invalid: must be 0 to {(1 << 32) - 1}")
        if not 2 * self.depth <= self.clear_interval <= 1 << 30 or self.clear_interval & (self.clear_interval - 1):
            raise UsageError(
                f"clear_interval {self.clear_interval} is invalid: must be a power of two from {2 * self.depth}, the "
                f"number of slots, to {1 << 30}"
            )

    @property
    def stripes(self) -> int:
        """Loopback: the pieces into which a CPU rank cuts a large message, one for each modelled rail."""
        return 1 if self.wire is None else len(self.wire.rails)

    @property
    def proxied(self) -> bool:
        """True if messages use the proxy thread."""
        return self.transport == "verbs" or self.loopback_mode == "proxied"

    def agreement(self) -> dict[str, str]:
        """Every option as text, for comparison with the peer's."""
        options = asdict(self)
        options |= options.pop("launch") or {}  # also the shape: both ranks must cut a message into the same pieces
        del options["rails"]  # they are names on this machine
        if self.wire is not None:
            options["wire"] = self.wire.model_dump_json()
        return {name: str(value) for name, value in options.items()}
