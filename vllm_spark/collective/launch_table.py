"""The launch table, a JSON file by `vllm-spark bench calibrate`: a GPU's launch shape and limit of the LL protocol.

The leader reads it and sends it to its follower, because both ranks must use the same values.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from vllm_spark.collective import LaunchShape, LoopbackMode, UsageError
from vllm_spark.errors import ConfigurationError
from vllm_spark.files import SMALL_FILE, atomic_write_text, configuration_folder, read_regular
from vllm_spark.records import RecordError, from_json, indented_json


@dataclasses.dataclass(frozen=True)
class LaunchTable:
    """The launch shape of collectives on a GPU, and the limit of the LL protocol.

    Attributes:
        gpu: name of the GPU that it was measured on; empty for the defaults.
        loopback_mode: the path on which it was measured; it applies to that one.
        packet_kib: messages up to this size, in KiB, use the LL protocol.
        shape: threads and blocks; None: the runtime's default.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    gpu: str = ""
    loopback_mode: LoopbackMode = "direct"
    packet_kib: Annotated[int, Field(ge=0, le=1024)] | None = None
    shape: LaunchShape | None = None

    def shape_on(self, mode: LoopbackMode) -> LaunchShape | None:
        """The shape for that path: `proxied` also for RDMA. None is the runtime's default."""
        return self.shape if self.loopback_mode == mode else None

    def packet_bytes(self, chosen_kib: int | None, slot_kib: int, mode: LoopbackMode) -> int | None:
        """The largest message that uses the LL protocol: the user's choice, else the table's for that path.

        None is the runtime's default.

        Args:
            chosen_kib: the user's choice, in KiB; None without one.
            slot_kib: size of a slot, in KiB, which is the upper limit.
            mode: whether this rank's messages use a proxy, as they always do over RDMA.
        """
        if chosen_kib is not None:
            return chosen_kib << 10
        if self.packet_kib is None or self.loopback_mode != mode:
            return None
        return min(self.packet_kib, slot_kib) << 10


def default_path() -> Path | None:
    """The default path of the launch table; None for a user without a home folder."""
    folder = configuration_folder()
    return None if folder is None else folder / "launch.json"


def load_launch_table(named: Path | None) -> LaunchTable:
    """The table in the file `named`, else the one at `default_path`, else the defaults.

    Raises:
        ConfigurationError: `named` does not exist; or the file cannot be read, or is not a launch table.
    """
    path = named or default_path()
    if path is None:
        return LaunchTable()
    remedy = "give another with --spark-launch-table, or write one: vllm-spark bench calibrate"
    try:
        return from_json(read_regular(path, SMALL_FILE), LaunchTable)
    except OSError as error:
        if named is None and isinstance(error, FileNotFoundError | NotADirectoryError):
            return LaunchTable()
        raise ConfigurationError(f"the launch table {path} cannot be read ({error.strerror}); {remedy}") from None
    except (RecordError, UsageError) as error:
        raise ConfigurationError(f"the launch table {path} is invalid: {error}; {remedy}") from None


def store_launch_table(table: LaunchTable, path: Path) -> None:
    """Writes `table` to `path` atomically, and creates its folder.

    Raises:
        ConfigurationError: it cannot be written.
    """
    atomic_write_text(path, indented_json(table) + "\n", "launch table")
