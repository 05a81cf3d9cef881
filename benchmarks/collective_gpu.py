"""Collectives on CUDA tensors: microseconds for one of 97 in a CUDA graph, by size, mode and launch shape.

    python -m benchmarks.collective_gpu [--shapes]

Two ranks, a thread each: on two GPUs if there are two, else on two streams of one, which then share its link to host
memory. Times are the graph's between two events, divided by 97: minimum, median, 95th percentile of 60 launches.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from tests.gpu.pair import Pair
from vllm_spark.collective import DeviceRuntime, LaunchShape

CALLS = 97  # all-reduces of one token in a 48-layer model
LAUNCHES = 60
KIB, MIB = 1 << 10, 1 << 20
MODES: dict[str, dict[str, Any]] = {
    "direct": {},
    "proxied": {"loopback_mode": "proxied"},
    "proxied, 3.2 us": {"loopback_mode": "proxied", "wire_latency_us": 3.2, "wire_gbytes_per_s": 24.0},
}


def microseconds(pair: Pair, collective: str, shape: tuple[int, ...], calls: int = CALLS) -> list[float]:
    """Sorted times of one collective on rank 0, with both ranks' graphs running."""

    def body(rank: int) -> list[float]:
        runtime = pair.runtimes[rank]
        tensor = torch.ones(shape, dtype=torch.bfloat16, device="cuda")
        with pair.capture() as graph:
            for _ in range(calls):
                result = runtime.all_reduce(tensor) if collective == "all_reduce" else runtime.all_gather(tensor, -1)
        samples = []
        for _ in range(LAUNCHES):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) * 1000 / calls)
        runtime.check()
        assert result.float().eq(2 if collective == "all_reduce" else 1).all()
        return samples

    return sorted(pair.run(body)[0])


def show(what: str, samples: list[float]) -> None:
    """Prints one line."""
    p95 = samples[len(samples) * 95 // 100]
    print(f"{what:<60} min {samples[0]:7.2f}  median {statistics.median(samples):7.2f}  p95 {p95:7.2f} us", flush=True)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", action="store_true", help="try launch shapes instead of modes")
    parser.add_argument("--packet-kib", type=int, default=8)
    args = parser.parse_args()
    print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
    if args.shapes:
        for threads in (128, 256, 512):
            for dependent in (False, True):
                DeviceRuntime.shape = LaunchShape(packet_threads=threads, dependent_launch=dependent)
                pair = Pair(packet_bytes=64 * KIB)
                for size in (4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB):
                    what = f"packets, {size} bytes, {threads} threads" + dependent * ", dependent"
                    show(what, microseconds(pair, "all_reduce", (size // 2,)))
                pair.close()
        for blocks in (16, 32):
            for dependent in (False, True):
                DeviceRuntime.shape = LaunchShape(payload_blocks=blocks, dependent_launch=dependent)
                pair = Pair(packet_bytes=0)
                for size in (16 * KIB, 64 * KIB, MIB, 8 * MIB):
                    samples = microseconds(pair, "all_reduce", (size // 2,), CALLS if size <= MIB else 10)
                    show(f"payload, {size} bytes, {blocks} blocks" + dependent * ", dependent", samples)
                pair.close()
        return
    for name, options in MODES.items():
        pair = Pair(packet_bytes=args.packet_kib * KIB, **options)
        for size in (KIB, 4 * KIB, 8 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 8 * MIB):
            samples = microseconds(pair, "all_reduce", (size // 2,), CALLS if size <= MIB else 10)
            show(f"all-reduce, {name}, {size} bytes", samples)
        for batch in (1, 8):
            show(f"all-gather, {name}, [{batch}, 75968]", microseconds(pair, "all_gather", (batch, 75_968), 10))
        pair.close()


if __name__ == "__main__":
    main()
