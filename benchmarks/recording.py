"""What a recording adds to a call, to one of vLLM's scopes for profilers, and to a collective on CPU tensors.

    python -m benchmarks.recording [--calls 200000] [--rounds 9]

Each with and without a recording, in turns. Calls and scopes: processor time, which others hardly change, of the
fastest round. Collectives: all-reduces of 2 KiB between two processes; the least of the rounds' medians.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from vllm_spark.cli.arguments import positive
from vllm_spark.recording.parts import FORWARD
from vllm_spark.recording.span_log import SpanLog


def nanoseconds(run: Callable[[int], None], calls: int, rounds: int) -> float:
    """Of one of `calls` in the fastest round, in this thread's processor time."""
    best = float("inf")
    for _ in range(rounds):
        start = time.thread_time_ns()
        run(calls)
        best = min(best, (time.thread_time_ns() - start) / calls)
    return best


def time_collectives(rank: int, exchange: Connection, results: Connection, calls: int, rounds: int) -> None:
    """One rank's process; rank 0 sends the least median in nanoseconds without a recording, and with one."""
    import torch

    from vllm_spark.collective import Runtime

    def swap(mine: bytes) -> bytes:
        exchange.send_bytes(mine)
        if not exchange.poll(60):
            raise TimeoutError("the other rank did not come to the exchange")
        return exchange.recv_bytes()

    torch.set_num_threads(1)
    medians: dict[bool, list[float]] = {False: [], True: []}
    with Runtime.connect(rank, 2, swap) as runtime:
        tensor = torch.ones(512)
        for _ in range(rounds + 1):
            for recorded in (False, True):
                if recorded:
                    runtime.start_recording(calls)
                samples = []
                for _ in range(calls):
                    start = time.perf_counter_ns()
                    runtime.all_reduce(tensor)
                    samples.append(time.perf_counter_ns() - start)
                runtime.stop_recording()
                medians[recorded].append(statistics.median(samples))
    if rank == 0:
        results.send((min(medians[False][1:]), min(medians[True][1:])))


def collectives(calls: int, rounds: int) -> tuple[float, float]:
    """Nanoseconds of an all-reduce without and with a recording."""
    context = multiprocessing.get_context("spawn")
    ends = context.Pipe()
    receiver, sender = context.Pipe(duplex=False)
    ranks = [
        context.Process(target=time_collectives, args=(rank, ends[rank], sender, calls, rounds), daemon=True)
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    if not receiver.poll(300):
        raise TimeoutError("the ranks did not finish within 300 s")
    found: tuple[float, float] = receiver.recv()
    for process in ranks:
        process.join(20)
    return found


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=positive, default=200_000)
    parser.add_argument("--rounds", type=positive, default=9)
    args = parser.parse_args()
    log = SpanLog(args.calls * args.rounds * 2)

    def nothing(first: int, second: int) -> None: ...

    recorded = log.timed(FORWARD)(nothing)
    scope: Callable[[str], contextlib.AbstractContextManager[None]] = contextlib.nullcontext  # type: ignore[assignment]

    def plain_calls(count: int) -> None:
        for _ in range(count):
            nothing(1, second=2)

    def recorded_calls(count: int) -> None:
        for _ in range(count):
            recorded(1, second=2)

    def plain_scopes(count: int) -> None:
        for _ in range(count):
            with scope("gpu_model_runner: forward"):
                pass

    def recorded_scopes(count: int) -> None:
        for _ in range(count):
            with log.scope("gpu_model_runner: forward"):
                pass

    for name, plain, with_record in (
        ("a call", plain_calls, recorded_calls),
        ("a scope", plain_scopes, recorded_scopes),
    ):
        before, after = (nanoseconds(run, args.calls, args.rounds) for run in (plain, with_record))
        print(f"{name}: {before:.0f} ns, recorded {after:.0f} ns, {after - before:.0f} ns more")
    before, after = collectives(args.calls // 70, args.rounds)
    print(f"an all-reduce of 2 KiB: {before:.0f} ns, recorded {after:.0f} ns, {after - before:.0f} ns more")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
