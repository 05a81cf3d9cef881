"""Reads temperatures, clocks and free memory of this machine: by NVML for the GPU, by psutil for the rest."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import psutil

from vllm_spark.backend.pair_status.records import Readings

_INTERVAL = 5.0  # seconds between two readings
_PROCESSOR_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal", "acpitz")
"""Drivers of processors' temperatures; ACPI's thermal zones where a processor has no driver of its own."""


class Sensors(threading.Thread):
    """Reads the sensors of this machine, and of the GPU that this process uses, every five seconds until it is stopped.

    In a thread of its own, because a driver may take long to answer, and heartbeats must not wait for it.
    """

    def __init__(self) -> None:
        super().__init__(name="spark-sensors", daemon=True)
        self._stopped = threading.Event()
        self.readings = Readings()
        """The last ones; nothing is known before the first."""

    def stop(self) -> None:
        """Ends the thread soon; does not wait for it."""
        self._stopped.set()

    def run(self) -> None:
        """The thread's loop."""
        gpu = None
        with contextlib.suppress(Exception):  # without a GPU or its driver
            gpu = _open_gpu()
        while True:
            self.readings = Readings(
                memory_available=psutil.virtual_memory().available,
                **({} if gpu is None else _gpu_readings(gpu)),
                **_processor_readings(),
            )
            if self._stopped.wait(_INTERVAL):
                return


def _gpu_readings(gpu: Any) -> dict[str, float]:
    """Whatever NVML reports: some of it is not supported on some GPUs."""
    import vllm.third_party.pynvml as nvml

    queries: dict[str, Callable[[], Any]] = {
        "gpu_celsius": lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        "gpu_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "gpu_most_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
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
