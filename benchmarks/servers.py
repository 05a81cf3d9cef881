"""Servers of one model on one machine: this project's pair, stock vLLM's pair, one rank of stock vLLM.

A server is started in one step and waited for in another, so that several can load at the same time.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from vllm_spark.collective.link_model import PUBLISHED_FIGURES, store_wire_model
from vllm_spark.config.settings import SECRET_VARIABLE
from vllm_spark.errors import SparkError
from vllm_spark.processes.child import python_module
from vllm_spark.processes.local import CPU_ENVIRONMENT, LOOPBACK
from vllm_spark.processes.managed import Process, answers, clean_environment

SERVERS = ("spark", "spark-wire", "spark-verbs", "stock", "one-rank")
"""This project's pair, direct, over the modelled link of published figures, and over this machine's RDMA devices;
vLLM's own pair; one rank."""

START_SECONDS = 300.0
FIRST_PORT = 20000

GPU_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_DISABLED_KERNELS": "MacheteLinearKernel",  # a GB10 has none
}
HOST_MEMORY = {
    "NCCL_P2P_DISABLE": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}
"""With which the ranks of stock vLLM's pair exchange data through host memory, as two machines do."""


@dataclass(frozen=True)
class Place:
    """Where servers run.

    Attributes:
        device: `cuda` or `cpu`.
        logs: folder of the processes' output.
        caches: folder of what vLLM compiles, a folder for each server: those that start together must not share one.
        one_gpu: both ranks of this project's pair use the first GPU.
    """

    device: str
    logs: Path
    caches: Path
    one_gpu: bool = False


@dataclass
class Started:
    """A server that was started; `stop` ends its processes, also those that failed."""

    name: str
    url: str
    processes: list[Process] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)
    ready_seconds: float = 0.0

    def wait_until_healthy(self, timeout: float = START_SECONDS) -> None:
        """Waits until it answers, and notes how long that took since its start.

        Raises:
            SparkError: a process ended, or the time is over.
        """

        def healthy() -> bool:
            for process in self.processes:
                if process.exit_code is not None:
                    raise SparkError(f"{process.name} ended with exit code {process.exit_code} while starting")
            return answers(f"{self.url}/health")

        self.processes[-1].wait_until(healthy, timeout, "become healthy")
        self.ready_seconds = time.monotonic() - self.since

    def stop(self, grace: float = 20.0) -> None:
        """Ends every process, after `grace` seconds by force."""
        with ExitStack() as stack:  # each is ended, whatever the others raise
            for process in self.processes:
                stack.callback(process.terminate, grace)

    def kill(self) -> None:
        """Ends every process by force; what asks the server then fails."""
        with ExitStack() as stack:
            for process in self.processes:
                stack.callback(process.kill9)


_ports = itertools.count(FIRST_PORT + os.getpid() % 500 * 10)


def _free_port() -> int:
    """A port that no other server of this process gets; below those that programs are given by the kernel."""
    while True:
        port = next(_ports)
        with socket.socket() as tried:
            try:
                tried.bind((LOOPBACK, port))
            except OSError:
                continue
        return port


def start_server(
    kind: str,
    name: str,
    model: Path,
    arguments: Sequence[str],
    place: Place,
    *,
    environment: Mapping[str, str] | None = None,
) -> Started:
    """Starts a server without waiting for it; its programs end with the calling thread.

    Args:
        kind: one of `SERVERS`.
        name: of its logs, and in messages.
        model: its folder.
        arguments: further ones of `vllm serve`.
        place: where it runs.
        environment: further variables of all processes.

    Raises:
        SparkError: a program could not be started.
    """
    port, spark_port = _free_port(), _free_port()
    cuda = place.device == "cuda"
    common = clean_environment() | (GPU_ENVIRONMENT if cuda else CPU_ENVIRONMENT)
    common |= {"VLLM_CACHE_ROOT": str(place.caches / name)} | dict(environment or {})
    server = Started(name, f"http://{LOOPBACK}:{port}")

    def start(what: str, argv: Sequence[str], more: Mapping[str, str]) -> None:
        log = f"{name}-{len(server.processes)}.log"
        everything = common | dict(more)
        server.processes.append(Process(f"{name}: {what}", argv, place.logs / log, everything, end_with_starter=True))

    serve = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--host", LOOPBACK, "--port", str(port), *arguments),
    ]
    if kind == "one-rank":
        start("vllm serve", serve, {"CUDA_VISIBLE_DEVICES": "0"})
    elif kind == "stock":
        pair = ["--tensor-parallel-size", "2", "--disable-custom-all-reduce"]
        start("vllm serve", [*serve, *pair], HOST_MEMORY if cuda else {})
    else:
        secret = {SECRET_VARIABLE: os.urandom(16).hex()}
        join = python_module("vllm_spark", "join", "--once", "--leader", LOOPBACK, "--port", str(spark_port))
        path = ["--spark-transport", "verbs" if kind == "spark-verbs" else "loopback"]
        if kind == "spark-wire":
            file = place.logs / f"{name}-wire.json"
            store_wire_model(PUBLISHED_FIGURES, file)
            path += ["--spark-loopback-mode", "proxied", "--spark-wire", str(file)]
        spark = ["--spark", "--spark-address", LOOPBACK, "--spark-port", str(spark_port)]
        second = "0" if place.one_gpu else "1"
        try:
            start("vllm-spark join", join, secret | {"CUDA_VISIBLE_DEVICES": second})
            start(
                "vllm serve --spark",
                [*serve, *spark, *path],
                secret | {"CUDA_VISIBLE_DEVICES": "0"},
            )
        except SparkError:
            server.kill()
            raise
    return server
