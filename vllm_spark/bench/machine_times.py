"""What a machine's GPU and CPU take for what every collective through a proxy does, here and on a GB10.

A figure of another machine becomes one of a GB10's by putting its times in the place of the measured ones. That is a
prediction, and no proof. It leaves out what only large messages use: the bandwidths of memory and of PCIe.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

from vllm_spark import _native

_ROUND_TRIPS, _KERNELS, _SAMPLES = 2000, 200, 11
_TIMEOUT_S = 10.0


class MachineTimes(NamedTuple):
    """Microseconds."""

    round_trip: float
    """From a system-scope store of the GPU into host memory until it sees a CPU thread's answer there.

    An all-reduce contains it once: a message goes from the sender's GPU to its proxy, and from the NIC to the
    receiver's GPU."""
    kernel: float
    """From one kernel to the next in a CUDA graph, with programmatic dependent launch."""


GB10 = MachineTimes(round_trip=1.41, kernel=0.42)
GB10_SOURCE = "published for a GB10: 1.41 us for a round trip between GPU and CPU, 0.42 us between dependent kernels"
"""The first by flash7777, the second by InterfaceX, both for a DGX Spark in 2026."""


def measure() -> MachineTimes:
    """Measures the current CUDA device, and the core on which this thread runs.

    Raises:
        SparkError: this build has no kernels, or the driver refuses something.
    """
    import torch

    from vllm_spark.collective.cuda_runtime import read_kernels

    torch.zeros(1, device="cuda")  # makes the device's context current for this thread
    probe = _native.MachineProbe(read_kernels())
    stream = torch.cuda.current_stream().cuda_stream
    trips = [probe.round_trip(_ROUND_TRIPS, _TIMEOUT_S, stream) for _ in range(_SAMPLES)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_KERNELS):
            probe.launch_nothing(torch.cuda.current_stream().cuda_stream)
    times = []
    for _ in range(_SAMPLES + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / _KERNELS)
    del graph  # before the probe, whose kernels it holds
    return MachineTimes(statistics.median(trips) / 1e3, statistics.median(times[1:]))


def on_gb10(microseconds: float, measured: MachineTimes) -> float:
    """What an all-reduce over the wire, in a graph, would take with a GB10's times.

    Args:
        microseconds: what it took here.
        measured: this machine's times, of the same run.
    """
    return microseconds - (measured.round_trip - GB10.round_trip) - (measured.kernel - GB10.kernel)
