"""Servers as a user starts them: stock vLLM on one host or two, and the pair under vllm_spark."""

from __future__ import annotations

import secrets
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from openai import DefaultHttpxClient, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from vllm_spark.processes.local import CPU_ENVIRONMENT
from vllm_spark.processes.managed import answers, program

from .hosts import Host, Hosts
from .process import Process, ProcessError

START_SECONDS = 300.0
"""How long a server may take to be healthy: ten times what it takes on two idle cores."""

COMMON_ARGUMENTS = (
    *("--dtype", "float32"),  # with bfloat16, ties between a random model's logits are common
    "--enforce-eager",
    *("--max-model-len", "1024"),
    *("--max-num-seqs", "16"),
)


@dataclass(frozen=True)
class Server:
    """A server that was started for a test, with every process that belongs to it."""

    url: str
    leader: Process
    follower: Process | None = None

    @cached_property
    def client(self) -> OpenAI:
        """The official client: no retries, no proxy, two minutes for one answer."""
        return OpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            timeout=120,
            max_retries=0,
            http_client=DefaultHttpxClient(trust_env=False),
        )

    @property
    def processes(self) -> tuple[Process, ...]:
        """Leader and, where there is one, follower."""
        return (self.leader,) if self.follower is None else (self.leader, self.follower)

    def wait_until_healthy(self, timeout: float = START_SECONDS) -> None:
        """Waits until the leader answers; raises ProcessError if one of the processes ends before."""

        def healthy() -> bool:
            for process in self.processes:
                if process.exit_code is not None:
                    raise ProcessError(f"{process.name} ended with exit code {process.exit_code} while starting")
            return answers(f"{self.url}/health")

        self.leader.wait_until(healthy, timeout, "become healthy")

    def metrics(self, prefix: str = "vllm_spark_") -> dict[str, dict[str, float]]:
        """Samples of `/metrics` whose name starts with `prefix`: name -> rank ("" without one) -> value.

        Samples that differ only in other labels are added up.
        """
        values: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for sample in self._samples():
            if sample.name.startswith(prefix):
                values[sample.name][sample.labels.get("rank", "")] += sample.value
        return {name: dict(by_rank) for name, by_rank in values.items()}

    def labelled(self, name: str, **labels: str) -> float:
        """The sum of the samples of `/metrics` that have this name and these labels; 0 if there are none."""
        return sum(
            sample.value
            for sample in self._samples()
            if sample.name == name and labels.items() <= dict(sample.labels).items()
        )

    def _samples(self) -> Iterator[Sample]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.url}/metrics", timeout=30) as response:
            text = response.read().decode()
        for family in text_string_to_metric_families(text):
            yield from family.samples


@contextmanager
def stock_tp1(
    host: Host,
    model: Path,
    extra_args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    *,
    cold: bool = False,
) -> Iterator[Server]:
    """`vllm serve MODEL` on one host, one rank: the reference for every token."""
    port = host.free_port()
    argv = [*_serve(host, model, port), *extra_args]
    with ExitStack() as stack:
        leader = host.popen(argv, CPU_ENVIRONMENT | dict(env or {}), "vllm serve", cold=cold)
        stack.callback(leader.terminate)
        server = Server(f"http://{host.address}:{port}", leader)
        server.wait_until_healthy()
        yield server


@contextmanager
def stock_tp2(
    hosts: Hosts, model: Path, extra_args: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Stock vLLM over the two hosts (`--nnodes 2`, gloo): what vllm_spark is compared with."""
    first, second = hosts
    port = first.free_port()
    pair = [
        *("--tensor-parallel-size", "2", "--nnodes", "2"),
        *("--master-addr", first.address, "--master-port", str(first.free_port())),
        *extra_args,
    ]
    with ExitStack() as stack:
        leader, follower = (
            host.popen(
                [*_serve(host, model, port), *pair, "--node-rank", str(host.index), *role],
                CPU_ENVIRONMENT | _gloo(host) | dict(env or {}),
                name,
            )
            for host, name, role in ((first, "vllm serve", ()), (second, "vllm serve headless", ("--headless",)))
        )
        # The headless rank does not notice that the head is gone, and need not be asked twice to go.
        stack.callback(follower.terminate, grace=2)
        stack.callback(leader.terminate)
        server = Server(f"http://{first.address}:{port}", leader, follower)
        server.wait_until_healthy()
        yield server


@contextmanager
def spark_tp2(
    hosts: Hosts,
    model: Path,
    extra_args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    *,
    join_args: Sequence[str] = (),
    join_env: Mapping[str, str] | None = None,
    wait: bool = True,
) -> Iterator[Server]:
    """The product: `vllm-spark join` on host 1, `vllm serve MODEL --spark` on host 0.

    Args:
        hosts: leader, follower.
        model: folder of the model.
        extra_args: further arguments of `vllm serve`.
        env: further variables of both.
        join_args: further arguments of `vllm-spark join`.
        join_env: further variables of it.
        wait: False yields at once, for tests of what happens during the start.
    """
    first, second = hosts
    spark_port = str(first.free_port())
    environment = {"VLLMSPARK_SECRET": secrets.token_hex(16)} | dict(env or {})
    join = [program("vllm-spark"), "join", "--leader", first.address, "--port", spark_port, *join_args]
    with ExitStack() as stack:
        follower = second.popen(join, CPU_ENVIRONMENT | environment | dict(join_env or {}), "vllm-spark join")
        stack.callback(follower.terminate)
        leader = stack.enter_context(spark_leader(hosts, model, spark_port, extra_args, environment, wait=False))
        server = Server(leader.url, leader.leader, follower)
        if wait:
            server.wait_until_healthy()
        yield server


@contextmanager
def spark_leader(
    hosts: Hosts,
    model: Path,
    spark_port: str,
    extra_args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    *,
    wait: bool = True,
) -> Iterator[Server]:
    """`vllm serve MODEL --spark` on host 0 alone, for a follower that looks for it at `spark_port`."""
    first = hosts[0]
    port = first.free_port()
    argv = [
        *_serve(first, model, port),
        *("--spark", "--spark-address", first.address, "--spark-port", spark_port),
        *("--spark-transport", "loopback"),
        *extra_args,
    ]
    with ExitStack() as stack:
        leader = first.popen(argv, CPU_ENVIRONMENT | dict(env or {}), "vllm serve --spark")
        stack.callback(leader.terminate)
        server = Server(f"http://{first.address}:{port}", leader)
        if wait:
            server.wait_until_healthy()
        yield server


def _serve(host: Host, model: Path, port: int) -> list[str]:
    return [
        *(program("vllm"), "serve", str(model), *COMMON_ARGUMENTS),
        *("--host", host.address, "--port", str(port)),
    ]


def _gloo(host: Host) -> dict[str, str]:
    """What stock vLLM must be told on a host whose name resolves to an address of another network."""
    return {"VLLM_HOST_IP": host.address, "GLOO_SOCKET_IFNAME": host.interface}
