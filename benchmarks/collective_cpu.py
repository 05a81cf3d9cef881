"""All-reduces between two processes on CPU tensors: this project's runtime, direct and proxied, against gloo.

    python -m benchmarks.collective_cpu [--rounds 5] [--calls 400] [--json FILE]

Per call and size: median, p99, and the ratio to gloo over 127.0.0.1 in the same round (the median over the rounds).
Then what the proxy's sleep costs: single small all-reduces after a pause, in which the proxy spins, yields or sleeps.
Two processes and two proxy threads share the machine's cores: on two cores these are upper bounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from vllm_spark.bench.statistics import Samples, machine, ratios, summary

SIZES = (4 << 10, 64 << 10, 1 << 20)  # bytes
PAUSES = (0.0, 20e-6, 200e-6, 5e-3)  # seconds of quiet before a single all-reduce
Candidate = Literal["direct", "proxied", "gloo"]
CANDIDATES: tuple[Candidate, ...] = ("direct", "proxied", "gloo")
WARM_UP = 50


def run_rank(rank: int, candidate: Candidate, port: int, calls: int, exchange: Connection, results: Connection) -> None:
    """One rank's process: measures every size, then every pause; rank 0 reports microseconds."""
    import torch

    torch.set_num_threads(1)
    all_reduce = _gloo(rank, port) if candidate == "gloo" else _ours(rank, candidate, exchange)
    measured: dict[str, Samples] = {}
    for size in SIZES:
        tensor = torch.ones(size // 4)
        measured[f"{size}"] = [_timed(all_reduce, tensor) for _ in range(WARM_UP + calls)][WARM_UP:]
    tensor = torch.ones(SIZES[0] // 4)
    for pause in PAUSES:
        samples = []
        for _ in range(min(calls, 200)):
            all_reduce(tensor)  # both ranks begin the pause together
            time.sleep(pause)
            samples.append(_timed(all_reduce, tensor))
        measured[f"after {pause * 1e6:.0f} us"] = samples
    if rank == 0:
        results.send(measured)


def _timed(all_reduce: Callable[[Any], Any], tensor: Any) -> float:
    start = time.perf_counter()
    all_reduce(tensor)
    return (time.perf_counter() - start) * 1e6


def _ours(rank: int, mode: Literal["direct", "proxied"], exchange: Connection) -> Callable[[Any], Any]:
    from vllm_spark.collective import Runtime, RuntimeOptions

    def swap(mine: bytes) -> bytes:
        exchange.send_bytes(mine)
        return exchange.recv_bytes()

    return Runtime.connect(rank, 2, swap, RuntimeOptions(loopback_mode=mode)).all_reduce


def _gloo(rank: int, port: int) -> Callable[[Any], Any]:
    import torch.distributed as dist

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    all_reduce: Callable[[Any], Any] = dist.all_reduce
    return all_reduce


def run_pair(candidate: Candidate, calls: int) -> dict[str, Samples]:
    """Runs both ranks of one candidate and returns rank 0's samples."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ends, (receiver, sender) = context.Pipe(), context.Pipe(duplex=False)
    ranks = [
        context.Process(target=run_rank, args=(rank, candidate, port, calls, ends[rank], sender)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    if not receiver.poll(300):
        raise SystemExit(f"{candidate} did not finish within 300 s")
    measured: dict[str, Samples] = receiver.recv()
    for process in ranks:
        process.join(30)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    import torch
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    rounds: dict[Candidate, list[dict[str, Samples]]] = {name: [] for name in CANDIDATES}
    for name in track(list(CANDIDATES) * args.rounds, "measuring", transient=True):
        rounds[name].append(run_pair(name, args.calls))
    where = machine(f"torch {torch.__version__}")
    table = Table(title=f"One all-reduce of float32 on CPUs, microseconds ({where})")
    table.add_column("bytes, or 4 KiB after a pause")
    for name in CANDIDATES:
        table.add_column(f"{name}, median", justify="right")
        table.add_column("p99", justify="right")
    for name in CANDIDATES[:-1]:
        table.add_column(f"{name} / gloo", justify="right")
    rows = []
    for what in rounds["gloo"][0]:
        row: dict[str, Any] = {"what": what}
        for name in CANDIDATES:
            row[name] = summary(one[what] for one in rounds[name])
        for name in CANDIDATES[:-1]:
            mine, gloo = ([one[what] for one in rounds[which]] for which in (name, "gloo"))
            row[f"{name} / gloo"] = statistics.median(ratios(mine, gloo))
        rows.append(row)
        figures = [f"{row[name][key]:.1f}" for name in CANDIDATES for key in ("median", "p99")]
        table.add_row(what, *figures, *(f"{row[f'{name} / gloo']:.2f}" for name in CANDIDATES[:-1]))
    Console(width=120).print(table)
    if args.json:
        args.json.write_text(json.dumps({"machine": where, "rounds": args.rounds, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
