"""Collectives on CUDA tensors: microseconds for one of 97 in a CUDA graph, by size and mode.

    python -m benchmarks.collective_gpu

Two ranks, a thread each: on two GPUs if there are two, else on two streams of one, which then share its link to host
memory. Times are the graph's between two events, divided by 97: minimum, median, 95th percentile of 60 launches.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from vllm_spark.bench.gpu_ranks import GpuPair, graph_times
from vllm_spark.collective import RuntimeOptions
from vllm_spark.collective.link_model import WireFigures

KIB, MIB = 1 << 10, 1 << 20
MODES: dict[str, dict[str, Any]] = {
    "direct": {},
    "proxied": {"loopback_mode": "proxied"},
    "proxied, 3.2 us": {"loopback_mode": "proxied", "wire": WireFigures.alpha_beta(3.2, 24.0)},
}


def show(what: str, samples: list[float]) -> None:
    """Prints one line."""
    p95 = samples[len(samples) * 95 // 100]
    print(f"{what:<60} min {samples[0]:7.2f}  median {statistics.median(samples):7.2f}  p95 {p95:7.2f} us", flush=True)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packet-kib", type=int, help="default: as when serving")
    args = parser.parse_args()
    print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, options in MODES.items():
        settings = RuntimeOptions(timeout_s=10.0, packet_bytes=args.packet_kib and args.packet_kib * KIB, **options)
        pair = GpuPair((settings, settings))
        for size in (KIB, 4 * KIB, 8 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 8 * MIB):
            samples = graph_times(pair, "all_reduce", (size // 2,))
            show(f"all-reduce, {name}, {size} bytes", samples)
        for batch in (1, 8):
            show(f"all-gather, {name}, [{batch}, 75968]", graph_times(pair, "all_gather", (batch, 75_968)))
        pair.close()


if __name__ == "__main__":
    main()
