"""Checks of the GPU's software: driver and CUDA versions, kernels in this build, and the NCCL in use."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from vllm_spark.compat.versions import is_cpu_build
from vllm_spark.doctor.finding import Finding
from vllm_spark.doctor.gpu.reading import GB10, Gpu
from vllm_spark.doctor.gpu.state import check_state
from vllm_spark.doctor.system import System

_NCCL_VARIABLE = "VLLM_NCCL_SO_PATH"


def missing() -> Finding:
    """The finding that there is no GPU."""
    cpu_build = is_cpu_build()
    return Finding(
        "gpu.driver",
        "GPU and driver",
        "note" if cpu_build else "problem",
        "none",
        "There is no /proc/driver/nvidia, and nvidia-smi fails. "
        + (
            "The installed vLLM is a CPU build, which does not need a GPU."
            if cpu_build
            else "vLLM needs the GPU's driver."
        ),
        "" if cpu_build else "sudo apt install nvidia-driver-580-open   # then restart",
    )


def check_gpu(system: System, gpu: Gpu) -> Iterator[Finding]:
    """Findings about the GPU."""
    yield _driver(gpu)
    yield from check_state(gpu)
    yield _kernels()
    yield _nccl(system, gpu)


def _driver(gpu: Gpu) -> Finding:
    title = "GPU and driver"
    value = ", ".join(
        filter(None, (gpu.model, f"driver {gpu.driver}" if gpu.driver else "", f"CUDA {gpu.cuda}" if gpu.cuda else ""))
    )
    if "mismatch" in gpu.complaint:
        return Finding(
            "gpu.driver",
            title,
            "problem",
            f"{value}: {gpu.complaint}",
            "The driver was updated, but its old kernel module is loaded; until a restart the GPU cannot be used.",
            "sudo reboot",
        )
    if gpu.complaint:
        return Finding(
            "gpu.driver",
            title,
            "unknown",
            value,
            f"The driver's CUDA version is unknown: {gpu.complaint}.",
            "nvidia-smi   # shows the error",
        )
    wanted = _torch_cuda()
    if wanted == "":
        return Finding(
            "gpu.driver",
            title,
            "warning",
            f"{value}, torch without CUDA",
            "The installed torch is a CPU build, which does not use the GPU.",
            "pip install vllm   # in a new environment; vLLM for GPUs installs torch for GPUs",
        )
    if wanted and gpu.cuda and int(wanted.partition(".")[0]) > int(gpu.cuda.partition(".")[0]):
        return Finding(
            "gpu.driver",
            title,
            "problem",
            f"{value}, torch is for CUDA {wanted}",
            "This torch needs a driver of the same CUDA major version, or later.",
            "sudo apt update && sudo apt full-upgrade   # a driver of at least 580 has CUDA 13; then restart",
        )
    return Finding("gpu.driver", title, "ok", f"{value}, torch for CUDA {wanted}" if wanted else value)


def _kernels() -> Finding:
    """Whether the file with the kernels exists; does not load the native module."""
    title = "Kernels in this build"
    spec = importlib.util.find_spec("vllm_spark._native")
    if spec is None or spec.origin is None:
        return Finding(
            "gpu.kernels",
            title,
            "problem",
            "the native module is not built",
            "It contains the collectives.",
            "pip install .   # in the source tree; needs g++, and nvcc for GPUs",
        )
    image = Path(spec.origin).with_name("kernels.fatbin")
    if image.is_file():
        return Finding("gpu.kernels", title, "ok", f"{image.name}, {image.stat().st_size >> 10} KiB")
    return Finding(
        "gpu.kernels",
        title,
        "problem",
        "none",
        "This vllm_spark was built without nvcc, so it has no collectives for tensors on a GPU.",
        "sudo apt install cuda-nvcc-13-0 && pip install --force-reinstall --no-deps .   # in the source tree",
    )


def _nccl(system: System, gpu: Gpu) -> Finding:
    title = "NCCL build"
    chosen = os.environ.get(_NCCL_VARIABLE, "")
    system_wide = next(iter(system.glob("usr/lib/*/libnccl.so.2")), None)
    bundled = _bundled_nccl()
    if bundled is None:
        where = chosen or (f"/{system_wide}" if system_wide else "")
        return Finding("gpu.nccl", title, "ok", f"the system's, {where}" if where else "none")
    version, path = bundled
    if path.resolve() != path and "site-packages" not in path.resolve().parts:
        return Finding("gpu.nccl", title, "ok", f"{version} as {path.resolve()}")
    library = f"/{system_wide}" if system_wide else "/usr/lib/aarch64-linux-gnu/libnccl.so.2"
    return Finding(
        "gpu.nccl",
        title,
        "warning" if GB10 in gpu.model else "note",
        f"{version} from pip" + (f", {_NCCL_VARIABLE}={chosen}" if chosen else ""),
        "Calls that the pair's own collectives do not support use NCCL. On two GB10, pip's build hung after 20 to 26 "
        "minutes under load, and DGX OS's build of the same version did not (vllm issues 42354 and 41725).",
        ("" if system_wide else "sudo apt install libnccl2\n") + f"ln -sf {library} {path}   # pip restores its own",
    )


def _bundled_nccl() -> tuple[str, Path] | None:
    """Version and library of the NCCL that pip installed; None if there is none."""
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if name.startswith("nvidia-nccl"):
            return distribution.version, Path(str(distribution.locate_file("nvidia/nccl/lib/libnccl.so.2")))
    return None


def _torch_cuda() -> str | None:
    """The CUDA version that torch was built for, without importing it; "" for a CPU build, None if not known."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        source = Path(next(iter(spec.submodule_search_locations)), "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda[^=]*= *(?:'([\d.]+)'|\"([\d.]+)\"|(None))", source, re.MULTILINE)
    return None if found is None else found[1] or found[2] or ""
