"""How much memory an end of a pair takes for its collectives: the sums of csrc/region_layout.hpp.

Said twice, since the doctor also examines machines whose native module is not built; a test compares both.
"""

from __future__ import annotations

from contextlib import suppress

from vllm_spark.config import SparkConfig
from vllm_spark.errors import ConfigurationError

_LINE, _PAGE = 128, 4096
_PACKET, _PACKET_DATA = 16, 8
_FLAGS = 64 * _LINE
"""Of one slot: a line for each of its pieces."""
_CONTROL = 2 * _PAGE
_HEADER = _INBOX = _PAGE
_OUTBOXES = 8 * _PAGE

_PACKET_BYTES = 8 << 10
"""The most that a runtime chooses by itself for what goes through a proxy."""


def region_bytes(slot_bytes: int, packet_bytes: int, depth: int) -> int:
    """Size of one rank's region.

    Args:
        slot_bytes: of one slot's payload.
        packet_bytes: the largest message that goes as packets.
        depth: chunks in flight; there are twice as many slots.
    """
    slots = 2 * depth
    # A packet in front of the data has the message's size.
    packets = _round_up((1 + -(-packet_bytes // _PACKET_DATA)) * _PACKET, _LINE)
    either_way = slots * _FLAGS + _round_up(slots * packets, _PAGE) + slots * _round_up(slot_bytes, _PAGE)
    return _HEADER + _CONTROL + _INBOX + _OUTBOXES + 2 * either_way


def pinned_bytes(config: SparkConfig, rails: int) -> int:
    """What is locked for the NICs with these settings: the whole region, once for every rail."""
    return rails * region_bytes(config.slot_kib << 10, _packet_bytes(config), config.depth)


def _packet_bytes(config: SparkConfig) -> int:
    """The largest message that goes as packets over RDMA."""
    found = None if config.packet_kib is None else config.packet_kib << 10
    # No native module, or a table that cannot be read or does not do: serving says so itself.
    with suppress(ImportError, OSError, ConfigurationError):
        from vllm_spark.launch_table import load_launch_table

        found = load_launch_table(config).packet_bytes(config, "proxied")
    return min(_PACKET_BYTES, config.slot_kib << 10) if found is None else found


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
