"""Two ranks in this process: a thread each, on two GPUs, or on two streams of a single GPU; and times of collectives.

On a single GPU, two processes would alternate in time slices of milliseconds, and each wait would take one.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vllm_spark.bench.collective import calls_for
from vllm_spark.collective import DeviceRuntime, RuntimeOptions
from vllm_spark.errors import SparkError
from vllm_spark.ranks import RANKS, WORLD_SIZE

MIB = 1 << 20
BOUND = 60.0
"""Seconds after which a rank counts as hung."""


class HungError(SparkError):
    """A rank hangs."""


class Exchange:
    """The exchange function of a rendezvous over two queues, between threads or processes."""

    def __init__(self, mine: Any, theirs: Any) -> None:
        self._mine, self._theirs = mine, theirs

    def __call__(self, message: bytes) -> bytes:
        self._theirs.put(message)
        return bytes(self._mine.get(timeout=BOUND))


class GpuPair:
    """Two connected ranks.

    Set CUDA_MODULE_LOADING=EAGER before CUDA starts: left to the first launch, loading a kernel waits for all that runs
    on the GPU, and on one GPU that is the other rank's kernel, which waits for this rank.

    Args:
        options: of each rank.
    """

    def __init__(self, options: tuple[RuntimeOptions, RuntimeOptions]) -> None:
        queues: tuple[queue.Queue[bytes], queue.Queue[bytes]] = (queue.Queue(), queue.Queue())
        self.devices = [torch.device("cuda", rank % torch.cuda.device_count()) for rank in RANKS]
        self.streams = [torch.cuda.Stream(device) for device in self.devices]
        self.runtimes: list[DeviceRuntime] = []
        self.barrier = threading.Barrier(2, timeout=BOUND)
        self._capturing = threading.Lock()
        self.run(_fill_allocator)

        def connect(rank: int) -> DeviceRuntime:
            exchange = Exchange(queues[rank], queues[1 - rank])
            runtime = DeviceRuntime.connect(
                rank,
                WORLD_SIZE,
                exchange,
                options[rank],
                description=f"test rank {rank}",
                announce=partial(self._deliver, 1 - rank),
            )
            assert isinstance(runtime, DeviceRuntime)
            return runtime

        self.runtimes = self.run(connect)

    def _deliver(self, rank: int, announcement: bytes) -> None:
        """Gives a rank what the other one announces of its rails; what comes before both are connected is repeated."""
        if self.runtimes:
            self.runtimes[rank].deliver(announcement)

    def run(self, body: Callable[[int], Any]) -> list[Any]:
        """`[body(0), body(1)]`, both at once, each on its rank's stream; raises the first error, if there is one."""
        results: list[Any] = [None, None]
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                with torch.cuda.device(self.devices[rank]), torch.cuda.stream(self.streams[rank]):
                    results[rank] = body(rank)
                    self.streams[rank].synchronize()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in RANKS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BOUND)
            if thread.is_alive():
                raise HungError(f"a rank of the GPU pair did not finish within {BOUND:.0f} s")
        if errors:
            raise errors[0]
        return results

    def outcomes(self, body: Callable[[int], Any]) -> list[Any]:
        """As `run`, but returns an error as its rank's result."""

        def caught(rank: int) -> Any:
            try:
                return body(rank)
            except Exception as error:
                return error

        return self.run(caught)

    @contextlib.contextmanager
    def capture(self) -> Iterator[torch.cuda.CUDAGraph]:
        """Captures the work of the calling rank, one rank at a time, and then synchronizes both ranks.

        The begin and the end of a capture wait for the whole device, which breaks another capture, and deadlocks with
        a kernel that waits for this rank.
        """
        graph = torch.cuda.CUDAGraph()
        with (
            self._capturing,
            torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"),
        ):
            yield graph
        self.barrier.wait()

    def close(self) -> None:
        """Closes both ranks."""
        self.run(lambda rank: self.runtimes[rank].close())


def _fill_allocator(rank: int) -> None:
    """Allocates memory for this rank's stream in advance.

    On one GPU, an allocation that goes to the driver waits for the other rank's kernel, which waits for this rank.
    """
    kept = [torch.empty(MIB // 2, dtype=torch.uint8, device="cuda") for _ in range(128)]
    kept += [torch.empty(32 * MIB, dtype=torch.uint8, device="cuda") for _ in range(16)]
    kept.clear()


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
            runtime.all_reduce(tensor)  # synchronizes both GPUs, whenever their hosts launched it
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) * 1000 / calls)
        runtime.check()
        if not result.float().eq(expected).all():
            raise SparkError(f"an {collective} of {shape} is wrong on rank {rank}")
        return samples

    return sorted(pair.run(body)[0])
