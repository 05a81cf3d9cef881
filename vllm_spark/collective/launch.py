"""How a collective's kernel is launched."""

from __future__ import annotations

from dataclasses import dataclass

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
