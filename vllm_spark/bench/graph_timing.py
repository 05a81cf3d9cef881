"""Microseconds of one collective in a CUDA graph of many, with both ranks' graphs running."""

from __future__ import annotations

import torch

from vllm_spark.bench.collective import calls_for
from vllm_spark.bench.gpu_ranks import GpuPair
from vllm_spark.errors import SparkError


def graph_times(pair: GpuPair, collective: str, shape: tuple[int, ...], launches: int = 60) -> list[float]:
    """Sorted times of one collective of bfloat16 on rank 0.

    Args:
        collective: `all_reduce`, or `all_gather` along the last dimension.
        shape: of each rank's input.
        launches: how often the graph runs; the time between its two events, over its collectives, is a sample.

    Raises:
        SparkError: a rank failed, or the result is wrong.
    """
    expected = 2.0 if collective == "all_reduce" else 1.0

    def body(rank: int) -> list[float]:
        runtime = pair.runtimes[rank]
        tensor = torch.ones(shape, dtype=torch.bfloat16, device="cuda")
        calls = calls_for(tensor.nbytes)
        with pair.capture() as graph:
            for _ in range(calls):
                result = runtime.all_reduce(tensor) if collective == "all_reduce" else runtime.all_gather(tensor, -1)
        samples = []
        for _ in range(launches):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            runtime.all_reduce(tensor)  # after it both GPUs are at the same point, whenever their hosts launched it
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) * 1000 / calls)
        runtime.check()
        if not result.float().eq(expected).all():
            raise SparkError(f"an {collective} of {shape} came out wrong on rank {rank}")
        return samples

    return sorted(pair.run(body)[0])
