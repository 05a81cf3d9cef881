"""The versions that must be the same on leader and follower."""

from __future__ import annotations

import dataclasses
import platform
from importlib import metadata

from vllm_spark import __version__
from vllm_spark.compat.versions import vllm_source

CHANNEL_VERSION = 5
"""Version of the messages between leader and follower."""


@dataclasses.dataclass(frozen=True)
class Versions:
    """Versions that must be the same on both machines: for pickles, and for equal numerical results."""

    channel: str
    vllm_spark: str
    vllm: str
    torch: str
    python: str

    @classmethod
    def of_this_process(cls) -> Versions:
        """The versions installed here; a package that is absent counts as `none`."""
        return cls(
            channel=str(CHANNEL_VERSION),
            vllm_spark=__version__,
            vllm=vllm_source(),
            torch=_installed("torch").partition("+")[0],
            python=".".join(platform.python_version_tuple()[:2]),
        )

    def packages(self) -> dict[str, str]:
        """Those that a user can install, by name."""
        return {"vllm_spark": self.vllm_spark, "vLLM": self.vllm, "torch": self.torch, "Python": self.python}

    def difference(self, other: Versions, here: str, there: str) -> str | None:
        """A sentence part naming the first differing field and both values; None if all agree."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                return f"{field.name} is {mine} on {here} and {theirs} on {there}; install the same version on both"
        return None


def _installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"
