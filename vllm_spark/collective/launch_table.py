"""What `vllm-spark bench calibrate` found on a GPU: how kernels are launched there, and which messages go as packets.

A JSON file. The leader reads it and sends what it says to its follower, since both ranks must agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from vllm_spark.collective import LaunchShape, UsageError
from vllm_spark.errors import ConfigurationError
from vllm_spark.files import atomic_write_text, configuration_folder


class LaunchTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How collectives are launched.

    Attributes:
        gpu: name of the GPU that it was measured on; empty for the defaults.
        loopback_mode: the path on which it was measured; through a proxy packets pay less.
        packet_kib: messages up to this size, in KiB, go as flagged packets on that path.
        shape: threads and blocks.
    """

    gpu: str = ""
    loopback_mode: Literal["direct", "proxied"] = "direct"
    packet_kib: Annotated[int, msgspec.Meta(ge=0, le=1024)] | None = None
    shape: LaunchShape = LaunchShape()

    def packet_bytes(self, chosen_kib: int | None, slot_kib: int, mode: Literal["direct", "proxied"]) -> int | None:
        """The largest message that goes as packets: the user's choice, else the table's for that path.

        None leaves it to the runtime.

        Args:
            chosen_kib: the user's choice, in KiB; None without one.
            slot_kib: size of a slot, in KiB: no packet message is larger.
            mode: whether this rank's messages go through a proxy, as they always do over RDMA.
        """
        if chosen_kib is not None:
            return chosen_kib << 10
        if self.packet_kib is None or self.loopback_mode != mode:
            return None
        return min(self.packet_kib, slot_kib) << 10


def default_path() -> Path | None:
    """Where `bench calibrate` writes unless told otherwise; None for a user without a home folder."""
    folder = configuration_folder()
    return None if folder is None else folder / "launch.json"


def load_launch_table(named: Path | None) -> LaunchTable:
    """The table in the file `named`, else the one at `default_path`, else the defaults.

    Raises:
        ConfigurationError: `named` is not there; or the file cannot be read, or holds something else.
    """
    path = named or default_path()
    if path is None:
        return LaunchTable()
    remedy = "give another with --spark-launch-table, or write one: vllm-spark bench calibrate"
    try:
        return msgspec.json.decode(path.read_bytes(), type=LaunchTable)
    except OSError as error:
        if named is None and isinstance(error, FileNotFoundError | NotADirectoryError):
            return LaunchTable()
        raise ConfigurationError(f"the launch table {path} cannot be read ({error.strerror}); {remedy}") from None
    except (msgspec.DecodeError, UsageError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the launch table {path} does not do ({error}); {remedy}") from None


def store_launch_table(table: LaunchTable, path: Path) -> None:
    """Writes `table` to `path`, whole or not at all, and makes its folder.

    Raises:
        ConfigurationError: it cannot be written.
    """
    atomic_write_text(path, msgspec.json.format(msgspec.json.encode(table), indent=1).decode() + "\n", "launch table")
