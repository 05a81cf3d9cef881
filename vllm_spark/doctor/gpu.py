"""The GPU: driver and CUDA versions, clocks, whether this build has kernels for it, and which NCCL is in use."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import msgspec

from vllm_spark.compat.versions import is_cpu_build
from vllm_spark.doctor.finding import Finding
from vllm_spark.doctor.system import System

_PROC = "proc/driver/nvidia"
_DRIVER = re.compile(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b")
_SLOWED = re.compile(r"^\s*(HW [\w ]*?(?:Slowdown|Brake))\s*: Active", re.MULTILINE)
_NCCL_VARIABLE = "VLLM_NCCL_SO_PATH"
GB10 = "GB10"
"""In the name of the GPU that this is made for."""


class Gpu(msgspec.Struct, frozen=True):
    """The first GPU, as the driver describes it. What is not known is empty."""

    model: str
    driver: str
    cuda: str = ""
    clock: str = ""
    """Its clock now, and the highest."""
    slowed_by: str = ""
    complaint: str = ""
    """What nvidia-smi said instead."""


def find_gpu(system: System) -> Gpu | None:
    """The machine's GPU; None if it has none, or no driver for it."""
    version = system.text(f"{_PROC}/version")
    models = [
        model[1].strip()
        for path in system.glob(f"{_PROC}/gpus/*/information")
        if (model := re.search(r"^Model:(.*)$", system.text(path) or "", re.MULTILINE))
    ]
    answer = system.run("nvidia-smi", "-q")
    if version is None and (answer is None or answer[0] != 0):
        return None
    number = _DRIVER.search(version or "")
    gpu = Gpu(model=models[0] if models else "", driver=number[1] if number else "")
    if answer is None:
        return msgspec.structs.replace(gpu, complaint="nvidia-smi is not installed, or did not answer")
    code, text = answer
    if code != 0:
        return msgspec.structs.replace(gpu, complaint=text.splitlines()[0] if text else f"exit code {code}")
    now, most = _clock(text, "Clocks"), _clock(text, "Max Clocks")
    return Gpu(
        model=gpu.model or _field(text, "Product Name"),
        driver=_field(text, "Driver Version") or gpu.driver,
        cuda=_field(text, "CUDA Version"),
        clock=f"{now} now, at most {most}" if now and most else "",
        slowed_by=", ".join(dict.fromkeys(_SLOWED.findall(text))),
    )


def missing() -> Finding:
    """That there is no GPU."""
    cpu_build = is_cpu_build()
    return Finding(
        "gpu.driver",
        "GPU and driver",
        "note" if cpu_build else "problem",
        "none",
        "Neither the driver's /proc/driver/nvidia nor nvidia-smi answers. "
        + ("The installed vLLM is a CPU build and needs none." if cpu_build else "vLLM needs the GPU's driver."),
        "" if cpu_build else "sudo apt install nvidia-driver-580-open   # then restart",
    )


def check_gpu(system: System, gpu: Gpu) -> Iterator[Finding]:
    """What depends on a GPU that is there."""
    yield _driver(gpu)
    if gpu.clock or gpu.slowed_by:
        yield _gpu_clock(gpu)
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
            "The driver was updated under the running kernel; nothing can use the GPU until the new one is loaded.",
            "sudo reboot",
        )
    if gpu.complaint:
        return Finding(
            "gpu.driver",
            title,
            "unknown",
            value,
            f"Which CUDA version the driver offers is not known: {gpu.complaint}.",
            "nvidia-smi   # see what it says",
        )
    wanted = _torch_cuda()
    if wanted == "":
        return Finding(
            "gpu.driver",
            title,
            "warning",
            f"{value}, torch without CUDA",
            "The installed torch is a CPU build and leaves the GPU idle.",
            "pip install vllm   # in a fresh environment: vLLM for GPUs brings a torch for them",
        )
    if wanted and gpu.cuda and int(wanted.partition(".")[0]) > int(gpu.cuda.partition(".")[0]):
        return Finding(
            "gpu.driver",
            title,
            "problem",
            f"{value}, torch is for CUDA {wanted}",
            "This torch needs a driver of its own CUDA generation, or later.",
            "sudo apt update && sudo apt full-upgrade   # a driver of at least 580 has CUDA 13; then restart",
        )
    return Finding("gpu.driver", title, "ok", f"{value}, torch for CUDA {wanted}" if wanted else value)


def _gpu_clock(gpu: Gpu) -> Finding:
    title = "GPU clock"
    value = gpu.clock + (f", slowed: {gpu.slowed_by}" if gpu.slowed_by else "")
    if not gpu.slowed_by:
        return Finding("gpu.clock", title, "ok", value)
    return Finding(
        "gpu.clock",
        title,
        "warning",
        value,
        "The hardware holds the GPU back, for heat or for want of power.",
        "nvidia-smi -q -d PERFORMANCE,POWER,TEMPERATURE   # which of them\n"
        "Use the power supply that came with the machine, and switch it off and unplug it for a minute.",
    )


def _kernels() -> Finding:
    """Looks for the file only: loading the native module is not needed for that."""
    title = "Kernels in this build"
    spec = importlib.util.find_spec("vllm_spark._native")
    if spec is None or spec.origin is None:
        return Finding(
            "gpu.kernels",
            title,
            "problem",
            "the native module is not built",
            "It holds the collectives.",
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
        "This vllm_spark was built where nvcc was not found, so it has no collectives for tensors on a GPU.",
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
        "What the pair's own collectives do not take goes through NCCL. On two GB10, pip's build hung after 20 to 26 "
        "minutes under load, and DGX OS's build of the same version did not (vllm issues 42354 and 41725).",
        ("" if system_wide else "sudo apt install libnccl2\n") + f"ln -sf {library} {path}   # pip puts its own back",
    )


def _bundled_nccl() -> tuple[str, Path] | None:
    """Version and library of the NCCL that pip installed; None if it did not."""
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


def _field(text: str, name: str) -> str:
    found = re.search(rf"^\s*{name}\s*: (.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _clock(text: str, section: str) -> str:
    found = re.search(rf"^ *{section}\n(?:  .*\n)*? +SM +: (\d+ MHz)", text, re.MULTILINE)
    return found[1] if found else ""
