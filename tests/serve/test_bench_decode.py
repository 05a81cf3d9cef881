"""`vllm-spark bench decode` on the CPU build: real engines, a real follower, real figures."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vllm_spark.processes.local import CPU_ENVIRONMENT
from vllm_spark.processes.managed import program

from .hosts import Host
from .process import Process, assert_all_gone

ROOT = Path(__file__).parents[2]


def bench(host: Host, short_folder: Path, *arguments: str) -> Process:
    argv = [program("vllm-spark"), "bench", "decode", "--device", "cpu", *arguments]
    return host.popen(argv, CPU_ENVIRONMENT | {"TMPDIR": str(short_folder)}, "vllm-spark bench decode")


@pytest.mark.parametrize(
    "candidates", [("spark-wire", "stock"), pytest.param(("tp1", "spark", "stock"), marks=pytest.mark.thorough)]
)
def test_figures_and_tokens(host: Host, short_folder: Path, candidates: Sequence[str]) -> None:
    """Every candidate is measured; the pair's tokens are those of vLLM's own, through this project's collectives."""
    file = short_folder / "figures.json"
    arguments = ["--candidates", ",".join(candidates), "--batches", "1,3", "--steps", "4", "--rounds", "1"]
    process = bench(host, short_folder, *arguments, "--json", str(file))
    assert process.wait(400) == 0, process.tail()
    figures = json.loads(file.read_text())
    rows = {(row["candidate"], row["batch"]): row for row in figures["rows"]}
    assert rows.keys() == {(name, batch) for name in candidates for batch in (1, 3)}
    (pair,) = (name for name in candidates if name.startswith("spark"))
    for (_, batch), row in rows.items():
        assert 0 < row["minimum"] <= row["median"] <= row["p99"]
        assert [len(tokens) for tokens in row["tokens"]] == [4 + 20 + 2] * batch
    for batch in (1, 3):
        assert rows[pair, batch]["tokens"] == rows["stock", batch]["tokens"]
    assert figures["fallbacks"] == {pair: 0}
    assert_all_gone(process)
    assert [path.name for path in short_folder.iterdir() if path.name.startswith("vllm-spark-")] == []


def test_the_profiler_runs_where_rank_0_does(host: Host, tiny_moe: Path) -> None:
    """vLLM's own pair has its ranks in processes of their own. Without a GPU they run no kernels."""
    environment = CPU_ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "tests.serve.profiled_pair", str(tiny_moe)]
    process = host.popen(argv, environment, "a profiled pair")
    assert process.wait(200) == 0, process.tail()
    found = json.loads(next(line for line in process.output().splitlines() if line.startswith("{")))
    first, *others = found["during"]
    assert [count for _, count in first] == [1, 0]
    assert len({found["engine"], *(process_id for process_id, _ in first)}) == 3
    assert all(other == first for other in others)
    assert [count for _, count in found["after"]] == [0, 0]
    assert (found["profile"], found["answers"]) == (None, [0, None])
    assert_all_gone(process)


def test_an_engine_that_fails_is_explained(host: Host, short_folder: Path) -> None:
    arguments = ["--candidates", "tp1", "--engine", '{"max_model_len": 10000000}']
    process = bench(host, short_folder, *arguments)
    assert process.wait(120) == 1
    output = process.output()
    assert "10000000" in output, "the cause, out of the engine's log"
    assert output.strip().splitlines()[-1].startswith("vllm-spark: tp1: the engine ended with exit code 1")
    (logs,) = short_folder.glob("vllm-spark-bench-logs-*")
    assert "10000000" in next(logs.rglob("tp1-0.log")).read_text()
    assert_all_gone(process)


def test_nothing_outlives_a_killed_benchmark(host: Host, short_folder: Path) -> None:
    process = bench(host, short_folder, "--candidates", "spark", "--steps", "3000", "--batches", "1")
    follower = "vllm-spark-bench-*/logs/spark-0-follower.log"
    process.wait_until(
        lambda: any("Ready" in log.read_text() for log in short_folder.glob(follower)), 120, "a follower that is ready"
    )
    assert len(process.descendants()) >= 3, "the engine's process and the follower's two"
    os.kill(process.pid, signal.SIGKILL)
    assert_all_gone(process, timeout=20)
