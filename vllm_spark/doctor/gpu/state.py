"""Checks of what the GPU does now: clock, power and temperature, other programs on it, and a display."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_spark.doctor.finding import Finding
from vllm_spark.doctor.gpu.reading import Gpu

_BUSY = 50  # percent, from which on the clock is the one of work
_STUCK, _CAPPED = 0.4, 0.8  # shares of the highest clock
_HOT = 88  # degrees Celsius
_OF_VLLM = "VLLM::"
"""How names of vLLM's processes begin."""

_UNPLUG = "Use the power supply that came with the machine, and switch it off and unplug it for a minute."
_SHOW = "nvidia-smi -q -d PERFORMANCE,POWER,TEMPERATURE,CLOCK   # while it computes"


def check_state(gpu: Gpu) -> Iterator[Finding]:
    """Findings about the GPU's present state; none about what nvidia-smi does not report."""
    if gpu.clock or gpu.slowed_by:
        yield _clock(gpu)
    if gpu.celsius is not None:
        yield _temperature(gpu.celsius)
    if gpu.display:
        yield _display(gpu)
    yield _programs(gpu)


def _clock(gpu: Gpu) -> Finding:
    """The clock counts while a kernel runs: an idle GPU lowers it."""
    title = "GPU clock"
    details = [gpu.clock, gpu.power_state, f"{gpu.watts:.0f} W" if gpu.watts is not None else ""]
    busy = gpu.busy is not None and gpu.busy >= _BUSY
    value = ", ".join(filter(None, [*details, f"{gpu.busy} % busy" if busy else ""]))
    if gpu.slowed_by:
        return Finding(
            "gpu.clock",
            title,
            "warning",
            ", ".join(filter(None, (value, f"slowed: {gpu.slowed_by}"))),
            "The GPU's clock is limited now, because of temperature or power.",
            f"{_SHOW}\n{_UNPLUG}",
        )
    share = gpu.mhz / gpu.most_mhz if gpu.most_mhz and busy else 1.0
    if share < _STUCK:
        return Finding(
            "gpu.clock",
            title,
            "warning",
            value,
            "It computes at a clock that a GB10 keeps after a failed negotiation with its power supply: 500 to 850 MHz "
            "in place of about 2400, with no error reported and 60 to 80 % of the speed lost "
            "(parallelArchitect/spark-gpu-throttle-check, README; 600 MHz in 0xBakeer/inference-atlas#112).",
            f"{_SHOW}\n{_UNPLUG}",
        )
    if share < _CAPPED:
        return Finding(
            "gpu.clock",
            title,
            "note",
            value,
            "It computes below its highest clock. Limits of 2000 to 2200 MHz, which owners of a GB10 set against heat, "
            "were reported to cost 15 to 35 % of the tokens (MiaAI-Lab/Qwen3.8-Flash-Next-Single-DGX-Spark#38).",
            "sudo nvidia-smi -rgc   # removes a limit that nvidia-smi -lgc has set",
        )
    return Finding("gpu.clock", title, "ok", value)


def _temperature(celsius: int) -> Finding:
    title = "GPU temperature"
    if celsius < _HOT:
        return Finding("gpu.temperature", title, "ok", f"{celsius} degrees")
    return Finding(
        "gpu.temperature",
        title,
        "warning",
        f"{celsius} degrees",
        "A GB10 lowered its clock at 91 to 92 degrees, and a limit of 2100 MHz kept it below 80 "
        "(NVIDIA/open-gpu-kernel-modules#1358).",
        "sudo nvidia-smi -lgc 0,2100   # if its air is free; costs tokens, nvidia-smi -rgc removes it",
    )


def _display(gpu: Gpu) -> Finding:
    title = "Display on the GPU"
    if gpu.display != "Enabled":
        return Finding("gpu.display", title, "ok", "none")
    return Finding(
        "gpu.display",
        title,
        "warning",
        "in use",
        "The driver ends kernels that run for some seconds where a display uses the GPU. A kernel that waits so long "
        "for the other machine, as while the cable is out, ends the server.",
        "sudo systemctl isolate multi-user.target   # until the next start; set-default instead of isolate for good",
    )


def _programs(gpu: Gpu) -> Finding:
    title = "Other programs on the GPU"
    if not gpu.programs:
        return Finding("gpu.programs", title, "ok", "none")
    value = ", ".join(
        f"{each.name} (process {each.process}{f', {each.memory}' if each.memory else ''})" for each in gpu.programs
    )
    if all(each.name.startswith(_OF_VLLM) for each in gpu.programs):
        return Finding("gpu.programs", title, "note", value, "vLLM runs here; a second engine does not fit beside it.")
    return Finding(
        "gpu.programs",
        title,
        "warning",
        value,
        "It takes memory and computing time, and the pair computes at the speed of the slower machine.",
        "\n".join(f"kill {each.process}" for each in gpu.programs if not each.name.startswith(_OF_VLLM)),
    )
