"""What an executor costs per decode step: ours and stock vLLM's for two nodes, with a worker that does nothing.

    python -m benchmarks.spine [--rounds 3] [--tokens 300] [--json FILE]

A real vLLM engine with its real scheduler runs in one process (rank 0's side), the other rank in another; both on this
machine over 127.0.0.1. Per decode step: *host time*, from the call of execute_model until sample_tokens has returned,
and *lag*, from that same call until the other rank's worker begins the step. Executors take turns, `--rounds` times, so
that a busy machine is busy for both; each round gives one ratio, and the median of the ratios is what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_spark.bench.statistics import machine, ratios, summary

ROOT = Path(__file__).parents[1]
BATCHES = (1, 32)
EXECUTORS = ("spark", "stock")
START_SECONDS = 300
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # scheduler and executor in the process that measures
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PYTHONPATH": str(ROOT),
}
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 32,
    "tensor_parallel_size": 2,
    "worker_cls": "benchmarks.null_worker.NullWorker",
}


def measure(executor: str, model: str, port: int, tokens: int) -> dict[str, dict[str, list[float]]]:
    """Runs rank 0's side and returns, per batch size, host times and lags in microseconds."""
    from vllm import LLM, SamplingParams

    if executor == "spark":
        settings = {"address": "127.0.0.1", "port": port, "transport": "loopback"}
        llm = LLM(model, additional_config={"spark": settings}, **ARGUMENTS)
    else:
        llm = LLM(model, nnodes=2, node_rank=0, master_addr="127.0.0.1", master_port=port, **ARGUMENTS)
    engine = llm.llm_engine.engine_core.engine_core
    spans = _time_steps(engine.model_executor)
    results = {}
    for batch in BATCHES:
        for count in (20, tokens):  # the first is a warm-up
            spans.clear()
            engine.model_executor.collective_rpc("take_stamps")
            sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            prompts = [{"prompt_token_ids": [7, 8, 9]} for _ in range(batch)]
            llm.generate(prompts, sampling, use_tqdm=False)
        stamps = engine.model_executor.collective_rpc("take_stamps")
        assert len(stamps[1]) == len(spans), (len(stamps[1]), len(spans))
        results[str(batch)] = {
            "host_us": [(end - start) * 1e6 for start, end in spans],
            "lag_us": [(begun - start) * 1e6 for begun, (start, _) in zip(stamps[1], spans, strict=True)],
        }
    engine.model_executor.shutdown()
    return results


def _time_steps(executor: Any) -> list[tuple[float, float]]:
    """Notes start and end of every step of `executor`."""
    spans: list[tuple[float, float]] = []
    execute, sample = executor.execute_model, executor.sample_tokens
    started = 0.0

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        nonlocal started
        started = time.monotonic()
        return execute(*args, **kwargs)

    def sample_tokens(*args: Any, **kwargs: Any) -> Any:
        result = sample(*args, **kwargs)
        spans.append((started, time.monotonic()))
        return result

    executor.execute_model, executor.sample_tokens = execute_model, sample_tokens
    return spans


def other_rank(executor: str, model: str, port: int) -> list[str]:
    """The command of rank 1's side."""
    scripts = Path(sys.executable).parent
    if executor == "spark":
        return [str(scripts / "vllm-spark"), "join", "--leader", "127.0.0.1", "--port", str(port), "--once"]
    flags = []
    for name, value in ARGUMENTS.items():
        flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    nodes = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    return [str(scripts / "vllm"), "serve", model, *flags, *nodes, "--headless"]


def run_round(executor: str, model: str, tokens: int) -> dict[str, dict[str, list[float]]]:
    """Starts both sides, measures, ends both."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {**os.environ, **ENVIRONMENT}
    with tempfile.TemporaryDirectory() as folder, Path(folder, "other.log").open("w") as log:
        other = subprocess.Popen(
            other_rank(executor, model, port), env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            output = Path(folder, "result.json")
            mine = [
                sys.executable,
                "-m",
                "benchmarks.spine",
                "--measure",
                executor,
                model,
                str(port),
                str(tokens),
                str(output),
            ]
            done = subprocess.run(
                mine, env=environment, capture_output=True, text=True, timeout=START_SECONDS, check=False
            )
            if done.returncode or not output.exists():
                sys.exit(f"{executor} failed:\n{done.stderr[-3000:]}\n{Path(folder, 'other.log').read_text()[-3000:]}")
            results: dict[str, dict[str, list[float]]] = json.loads(output.read_text())
            return results
        finally:
            os.killpg(other.pid, signal.SIGKILL)
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--json")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        executor, model, port, tokens, output = args.measure
        Path(output).write_text(json.dumps(measure(executor, model, int(port), int(tokens))))
        return

    import vllm
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from vllm_spark.models.tiny import make_tiny_model

    rounds: dict[str, list[dict[str, dict[str, list[float]]]]] = {name: [] for name in EXECUTORS}
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_tiny_model(Path(folder, "model"), "dense"))
        for executor in track(list(EXECUTORS) * args.rounds, "measuring", transient=True):
            rounds[executor].append(run_round(executor, model, args.tokens))
    where = machine(f"vLLM {vllm.__version__}")
    table = Table(title=f"One decode step with a worker that does nothing ({where})")
    for column in ("", "batch", "ours, median us", "p99", "stock, median us", "p99", "ours / stock"):
        table.add_column(column, justify="left" if not column else "right")
    rows = []
    for what, label in (("host_us", "host time on the leader"), ("lag_us", "lag of the other rank")):
        for batch in map(str, BATCHES):
            samples = {name: [one[batch][what] for one in rounds[name]] for name in EXECUTORS}
            each = ratios(samples["spark"], samples["stock"])
            row: dict[str, Any] = {"what": label, "batch": int(batch), "ratio": statistics.median(each), "ratios": each}
            row |= {name: summary(samples[name]) for name in EXECUTORS}
            rows.append(row)
            figures = [f"{row[name][key]:.0f}" for name in EXECUTORS for key in ("median", "p99")]
            table.add_row(label, batch, *figures, f"{row['ratio']:.2f}")
    Console(width=120).print(table)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": where, "rounds": args.rounds, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
