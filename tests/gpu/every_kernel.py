"""Runs every kernel a few times over each path, eager and replayed: a short program for compute-sanitizer.

    compute-sanitizer --tool racecheck python -m tests.gpu.every_kernel

With `--tool memcheck` too. Exit code 1 if a result is wrong; what the tool finds, it says itself.
"""

from __future__ import annotations

import os
import sys
from functools import partial

import torch

from vllm_spark.bench.gpu_ranks import GpuPair
from vllm_spark.collective import LoopbackMode, RuntimeOptions
from vllm_spark.collective.link_model import PUBLISHED_FIGURES, WireFigures

KIB = 1 << 10
PATHS: tuple[tuple[LoopbackMode, WireFigures | None], ...] = (
    ("direct", None),
    ("proxied", None),
    ("proxied", PUBLISHED_FIGURES),
)
TIMEOUT = 100.0  # seconds: under a tool a kernel takes long
SIZES = (5, 2048, 40_001, 200_000)  # elements: one packet, a decode step's, several messages with a broken end
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def wrong_results(pair: GpuPair, rank: int) -> int:
    """How many of this rank's results are wrong."""
    runtime, wrong = pair.runtimes[rank], 0
    for size in SIZES:
        for dtype in DTYPES:
            tensor = torch.full((size,), 1.0 + rank, dtype=dtype, device="cuda")
            wrong += int(not runtime.all_reduce(tensor).eq(3).all())
            row = tensor.view(1, -1)[:, : max(16, size // 16 * 16)]
            both = runtime.all_gather(row, -1)
            wrong += int(not both.view(2, -1).eq(torch.tensor([[1], [2]], device="cuda")).all())
            runtime.all_reduce(tensor, out=tensor)
            wrong += int(not tensor.eq(3).all())
    with pair.capture() as graph:
        for _ in range(4):
            result = runtime.all_reduce(tensor)
    graph.replay()
    graph.replay()
    torch.cuda.current_stream().synchronize()
    runtime.check()
    return wrong + int(not result.eq(6).all())


def main() -> int:
    """Runs them all."""
    # Before CUDA starts: see GpuPair. With kernels loaded at their first use 2 of 7 runs under racecheck hung.
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    wrong = 0
    for mode, wire in PATHS:
        for packet_bytes in (None, 0):
            options = RuntimeOptions(
                loopback_mode=mode,
                wire=wire,
                timeout_s=TIMEOUT,
                depth=2,
                slot_bytes=64 * KIB,
                packet_bytes=packet_bytes,
            )
            pair = GpuPair((options, options))
            found = pair.run(partial(wrong_results, pair))
            pair.close()
            path = mode if wire is None else f"{mode} over {wire.summary}"
            print(f"{path}, packets up to {packet_bytes}: {found} wrong results", flush=True)
            wrong += sum(found)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
