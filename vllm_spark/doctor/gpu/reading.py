"""What the driver and nvidia-smi say of a machine's first GPU."""

from __future__ import annotations

import dataclasses
import re

from vllm_spark.doctor.system import System

_PROC = "proc/driver/nvidia"
_DRIVER = re.compile(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b")
_SLOWED = re.compile(r"^\s*(HW [\w ]*?(?:Slowdown|Brake)|SW Thermal Slowdown)\s*: Active", re.MULTILINE)
_PROGRAM = re.compile(
    r"^ +Process ID +: (\d+)\n +Type +: ([\w+]+)\n +Name +: (.*)(?:\n +Used GPU Memory +: (.*))?", re.MULTILINE
)
GB10 = "GB10"
"""Part of the name of the supported GPU."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that computes on a GPU; `memory` is as nvidia-smi has it, such as `1024 MiB`, or empty."""

    process: int
    name: str
    memory: str = ""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The first GPU, as the driver describes it. Unknown values are empty."""

    model: str
    driver: str
    cuda: str = ""
    clock: str = ""
    """Its current clock and its maximum."""
    mhz: int = 0
    most_mhz: int = 0
    power_state: str = ""
    """`P0` is the fastest."""
    watts: float | None = None
    celsius: int | None = None
    busy: int | None = None
    """Percent of the time in which a kernel ran; None if it is not known."""
    programs: tuple[Program, ...] = ()
    """Those that compute, without those that draw."""
    slowed_by: str = ""
    display: str = ""
    """`Enabled` while a display uses it."""
    memory: int = 0
    """Bytes of its own memory; 0 if it shares the machine's, as a GB10 does."""
    complaint: str = ""
    """The error message of nvidia-smi."""


def find_gpu(system: System) -> Gpu | None:
    """The machine's GPU; None without a GPU or a driver."""
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
        return dataclasses.replace(gpu, complaint="nvidia-smi is not installed, or timed out")
    code, text = answer
    if code != 0:
        return dataclasses.replace(gpu, complaint=text.splitlines()[0] if text else f"exit code {code}")
    now, most = _clock(text, "Clocks"), _clock(text, "Max Clocks")
    programs = [
        Program(int(pid), name.strip(), used) for pid, kind, name, used in _PROGRAM.findall(text) if "C" in kind
    ]
    return Gpu(
        model=gpu.model or _field(text, "Product Name"),
        driver=_field(text, "Driver Version") or gpu.driver,
        cuda=_field(text, "CUDA Version"),
        clock=f"{now} now, at most {most}" if now and most else "",
        mhz=int(_number(now) or 0),
        most_mhz=int(_number(most) or 0),
        power_state=_field(text, "Performance State"),
        watts=_first(text, "Instantaneous Power Draw", "Average Power Draw", "Power Draw"),
        celsius=_whole(_first(text, "GPU Current Temp")),
        busy=_whole(_first_of_section(text, "Utilization", "Gpu|GPU")),
        programs=tuple(programs),
        slowed_by=", ".join(dict.fromkeys(_SLOWED.findall(text))),
        display=_field(text, "Display Active"),
        memory=_own_memory(text),
    )


def _field(text: str, name: str) -> str:
    found = re.search(rf"^\s*{name}\s*: (.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _own_memory(text: str) -> int:
    found = re.search(r"^ *FB Memory Usage\n +Total +: (\d+) MiB", text, re.MULTILINE)
    return int(found[1]) << 20 if found else 0


def _clock(text: str, section: str) -> str:
    found = re.search(rf"^ *{section}\n(?:  .*\n)*? +SM +: (\d+ MHz)", text, re.MULTILINE)
    return found[1] if found else ""


def _first_of_section(text: str, section: str, name: str) -> float | None:
    found = re.search(rf"^ *{section}\n(?:  .*\n)*? +(?:{name}) +: (.*)$", text, re.MULTILINE)
    return _number(found[1]) if found else None


def _first(text: str, *names: str) -> float | None:
    """The number of the first of these fields that has one: a GB10 leaves out many, and versions differ in names."""
    return next((value for name in names if (value := _number(_field(text, name))) is not None), None)


def _number(text: str) -> float | None:
    found = re.match(r"\d+(?:\.\d+)?", text)
    return float(found[0]) if found else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
