"""What a search measures with; results of other versions do not count."""

from __future__ import annotations

from contextlib import suppress

from vllm_spark import __version__


def installed_versions() -> dict[str, str]:
    """Of vLLM, torch, Triton and this project, and of NVIDIA's driver where there is one.

    Asks the packages themselves: some are distributed under other names.
    """
    import torch
    import triton
    import vllm

    versions = {
        "vllm": str(vllm.__version__),
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "vllm_spark": __version__,
    }
    driver = _driver_version()
    return versions if driver is None else {**versions, "driver": driver}


def _driver_version() -> str | None:
    from vllm.third_party import pynvml

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            version = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
        return version.decode() if isinstance(version, bytes) else str(version)
    return None
