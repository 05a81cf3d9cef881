"""The syntax for RDMA ports in settings and in the runtime's options: DEVICE, DEVICE:PORT or DEVICE:PORT:GID_INDEX."""

from __future__ import annotations

import re
from typing import NamedTuple

_FORM = re.compile(r"(?P<device>[^:\s]+)(:(?P<port>[1-9][0-9]*)(:(?P<gid_index>[0-9]+))?)?")


class RailChoice(NamedTuple):
    """An RDMA port for a rail: `mlx5_0`, `mlx5_0:1` or `mlx5_0:1:3`."""

    device: str
    port: int | None
    """Counted from 1; None for the first."""
    gid_index: int | None
    """The index of the only address to use; None for all addresses."""

    @classmethod
    def parse(cls, text: str) -> RailChoice:
        """Parses one choice.

        Raises:
            ValueError: `text` has another syntax.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not an RDMA port; write DEVICE, DEVICE:PORT or DEVICE:PORT:GID_INDEX, such as mlx5_0:1:3"
            )
        port, gid_index = (None if number is None else int(number) for number in match.group("port", "gid_index"))
        return cls(match["device"], port, gid_index)
