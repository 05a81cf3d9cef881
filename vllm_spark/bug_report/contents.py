"""The sections of a bug report, as text that is not redacted yet."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from vllm_spark.bug_report.redaction import shown_variable
from vllm_spark.compat.patching import all_patches, state_of
from vllm_spark.compat.versions import installed_vllm
from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor.checks import run_checks
from vllm_spark.doctor.report import Report, show
from vllm_spark.doctor.system import System
from vllm_spark.errors import described
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.handshake.versions import Versions
from vllm_spark.variables import OLD_PREFIX, PREFIX

LOG_LINES = 300
"""Of each log, the last ones."""

_LOG_BYTES = 1 << 20
_WIDTH = 100
_PREFIXES = (PREFIX, OLD_PREFIX, "VLLM_", "NCCL_", "CUDA_", "HF_", "TORCH", "PYTORCH_", "TRITON_", "FLASHINFER_")
_NAMES = ("LD_PRELOAD", "LD_LIBRARY_PATH", "GLOO_SOCKET_IFNAME", "RANK", "WORLD_SIZE", "MASTER_ADDR")
_UNITS = ("vllm-spark-join", "vllm-spark-serve")
"""The systemd user units of README.md."""


class Section(NamedTuple):
    """A part of the report."""

    title: str
    text: str


def sections(
    config: SparkConfig, problem: str, status: Callable[[], str], logs: Iterable[Path], leader: str | None
) -> list[Section]:
    """All sections. A section that cannot be made says why, and the others follow.

    Args:
        config: the settings of this user.
        problem: why those could not be read; empty if they could.
        status: returns what the pair says of itself.
        logs: files whose last lines are wanted.
        leader: address of the leader, on a follower.
    """
    parts: list[tuple[str, Callable[[], str]]] = [
        ("versions", _versions),
        ("configuration", lambda: _configuration(config, problem, os.environ)),
        ("changes to vLLM", _patches),
        ("vllm-spark doctor", lambda: _doctor(config, leader)),
        ("status of the pair", status),
        *((f"log {path}", lambda path=path: _tail(path)) for path in logs),
        *((f"journal of {unit}", lambda unit=unit: _journal(System(), unit)) for unit in _UNITS),
    ]
    return [Section(title, _guarded(part)) for title, part in parts]


def _guarded(part: Callable[[], str]) -> str:
    try:
        return part().rstrip() or "(nothing)"
    except Exception as error:  # a report of a broken machine must still be made
        return f"could not be read: {described(error)}"


def _versions() -> str:
    found = Versions.of_this_process()
    lines = [f"{name} {value}" for name, value in vars(found).items()]
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    return "\n".join([f"host {host_name()}", *lines, f"vLLM as installed {installed_vllm()}", kernel])


def _configuration(config: SparkConfig, problem: str, environment: Mapping[str, str]) -> str:
    fields = type(config).model_fields
    changed = [
        f"{name} = {value}" for name, value in config.model_dump().items() if value != fields[name].get_default()
    ]
    variables = [
        shown_variable(name, value)
        for name, value in sorted(environment.items())
        if name.startswith(_PREFIXES) or name in _NAMES
    ]
    return "\n".join(
        [
            *([f"the settings cannot be read: {problem}"] if problem else []),
            "settings that are not the default:",
            *(changed or ["(none)"]),
            "variables:",
            *(variables or ["(none)"]),
        ]
    )


def _patches() -> str:
    return "\n".join(f"{patch.name}: {state_of(patch)}" for patch in all_patches())


def _doctor(config: SparkConfig, leader: str | None) -> str:
    machine = run_checks(System(), config, leader, thorough=True)
    output = StringIO()
    show(Report.of(machine, None, []), Console(file=output, width=_WIDTH, highlight=False))
    return output.getvalue()


def _tail(path: Path) -> str:
    """The last lines of a log."""
    if not path.is_file():
        return "it is not a file"
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
        return "\n".join(file.read(_LOG_BYTES).decode(errors="replace").splitlines()[-LOG_LINES:])


def _journal(system: System, unit: str) -> str:
    answer = system.run("journalctl", "--user", "--no-pager", "-o", "short-iso", "-n", str(LOG_LINES), "-u", unit)
    if answer is None:
        return "journalctl is not installed"
    return answer[1]
