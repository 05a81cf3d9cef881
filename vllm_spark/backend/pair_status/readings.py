"""Reads temperatures, clocks and free memory of this machine: by NVML for the GPU, by psutil for the rest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import psutil

from vllm_spark.backend.pair_status.records import Readings

_INTERVAL = 5.0  # seconds for which readings count as those of now
_PROCESSOR_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal", "acpitz")
"""Drivers of processors' temperatures; a GB10 has `acpitz`."""


class Sensors:
    """The sensors of this machine, and of the GPU that this process uses. For one thread."""

    def __init__(self) -> None:
        self._gpu: Any = None
        self._looked = False
        self._read_at = 0.0
        self._readings = Readings()

    def read(self) -> Readings:
        """The readings of now, or of up to five seconds ago."""
        if not self._read_at or time.monotonic() - self._read_at >= _INTERVAL:
            self._readings = Readings(
                memory_available=psutil.virtual_memory().available,
                **self._gpu_readings(),
                **_processor_readings(),
            )
            self._read_at = time.monotonic()
        return self._readings

    def _gpu_readings(self) -> dict[str, float]:
        """Whatever NVML reports: some of it is not supported on some GPUs."""
        if not self._looked:
            self._looked = True
            with contextlib.suppress(Exception):  # without a GPU or its driver
                self._gpu = _open_gpu()
        if self._gpu is None:
            return {}
        import vllm.third_party.pynvml as nvml

        queries: dict[str, Callable[[], Any]] = {
            "gpu_celsius": lambda: nvml.nvmlDeviceGetTemperature(self._gpu, nvml.NVML_TEMPERATURE_GPU),
            "gpu_mhz": lambda: nvml.nvmlDeviceGetClockInfo(self._gpu, nvml.NVML_CLOCK_SM),
            "gpu_most_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(self._gpu, nvml.NVML_CLOCK_SM),
        }
        found = {}
        for name, query in queries.items():
            with contextlib.suppress(nvml.NVMLError):
                found[name] = float(query())
        return found


def _open_gpu() -> Any:
    """NVML's handle of the GPU that this process uses; None on a CPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    import vllm.third_party.pynvml as nvml

    nvml.nvmlInit()
    return nvml.nvmlDeviceGetHandleByIndex(current_platform.device_id_to_physical_device_id(0))


def _processor_readings() -> dict[str, float]:
    found = {}
    with contextlib.suppress(OSError, AttributeError):
        sensors = psutil.sensors_temperatures()
        temperatures = [entry.current for name in _PROCESSOR_SENSORS for entry in sensors.get(name, [])]
        if temperatures:
            found["cpu_celsius"] = max(temperatures)
    with contextlib.suppress(OSError, AttributeError, NotImplementedError):
        clock = psutil.cpu_freq()
        if clock is not None and clock.current:
            found["cpu_mhz"] = clock.current
            if clock.max:
                found["cpu_most_mhz"] = clock.max
    return found
