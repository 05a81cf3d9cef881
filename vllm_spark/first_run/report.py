"""The report file of a first run: everything a maintainer needs, and no secret."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import platform
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor.checks import MachineReport
from vllm_spark.doctor.system import System
from vllm_spark.executor.handshake.versions import Versions
from vllm_spark.files import atomic_write_text
from vllm_spark.first_run.result import StepResult
from vllm_spark.records import indented_json

_SECRET_SETTINGS = frozenset({"secret_file"})
_KERNEL_LINES = 200
_KERNEL_WORDS = re.compile(r"mlx5|infiniband|rdma|roce|nvrm|nvidia|xid|aer|iommu|oom", re.IGNORECASE)
_IPV4 = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4}(?![\w:])")
_PUBLIC = "(public address)"
_SECRET = "(secret)"


@dataclasses.dataclass
class Report:
    """The content of the file.

    Attributes:
        rank: 0 on the listening machine.
        result: `passed`, `warning`, `failed` or `stopped`.
        reason: the sentence of the step that did not pass; empty if all is well.
        host, peer: names of both machines.
        device: whose tensors the collectives had.
        limits_apply: whether figures were compared with those of a GB10.
        kernel_messages: about network cards, GPU and memory; None if this user may not read them.
    """

    rank: int
    host: str
    started: datetime
    settings: dict[str, Any]
    result: str = "stopped"
    reason: str = ""
    seconds: float = 0.0
    format: str = "vllm-spark first run 1"
    versions: Versions = dataclasses.field(default_factory=Versions.of_this_process)
    system: str = dataclasses.field(default_factory=lambda: _kernel())
    peer: str = ""
    gpu: str = ""
    peer_gpu: str = ""
    device: str = ""
    limits_apply: bool = False
    steps: list[StepResult] = dataclasses.field(default_factory=list)
    machine: MachineReport | None = None
    kernel_messages: list[str] | None = None

    @classmethod
    def begin(cls, rank: int, host: str, config: SparkConfig) -> Report:
        """The report of a run that begins now."""
        settings = {name: value for name, value in config.model_dump().items() if name not in _SECRET_SETTINGS}
        return cls(rank, host, datetime.now(timezone.utc).replace(microsecond=0), settings)

    def write(self, path: Path, secret: str) -> None:
        """Writes the file.

        Args:
            path: the file.
            secret: what must not be in it; empty if there is none.

        Raises:
            ConfigurationError: it cannot be written.
        """
        atomic_write_text(path, redacted(indented_json(dataclasses.asdict(self)), secret) + "\n", "report")


def _kernel() -> str:
    """Kernel and processor architecture: not the host name, which `platform.platform` may have."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def redacted(text: str, secret: str) -> str:
    """`text`, which may be JSON, without the secret and without public addresses."""
    if secret:
        for form in (json.dumps(secret, ensure_ascii=False)[1:-1], secret):
            text = text.replace(form, _SECRET)
    return _IPV6.sub(_private_only, _IPV4.sub(_private_only, text))


def _private_only(found: re.Match[str]) -> str:
    try:
        address = ipaddress.ip_address(found[0])
    except ValueError:
        return found[0]  # a version, a time or a PCI address
    mapped = getattr(address, "ipv4_mapped", None) or address
    return _PUBLIC if mapped.is_global else found[0]


def kernel_messages(system: System) -> list[str] | None:
    """The last messages of the kernel about network cards, GPU and memory; None if they cannot be read."""
    answer = system.run("dmesg")
    if answer is None or answer[0] != 0:
        return None
    return [line for line in answer[1].splitlines() if _KERNEL_WORDS.search(line)][-_KERNEL_LINES:]
