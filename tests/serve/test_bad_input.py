"""What a user can get wrong on the command line ends in one sentence with the value and the remedy, and exit code 2."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vllm_spark.config.settings import SparkConfig, flag_name, side_of
from vllm_spark.processes.local import CPU_ENVIRONMENT
from vllm_spark.processes.managed import program

from .hosts import Host
from .process import Process, assert_all_gone

START_SECONDS = 120.0
"""Bound for what ends while vLLM is still reading its arguments: mostly the time to import it, on a busy machine."""

NO_RDMA = (
    ["install it (apt install libibverbs1 ibverbs-providers)"]
    if find_library("ibverbs") is None
    else ["vllm-spark doctor", "--spark-transport loopback"]
)
"""The remedy on a machine without RDMA devices."""

LISTEN = """import socket, sys
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as server:
    print("up", flush=True)
    server.accept()
"""


VARIABLES = CPU_ENVIRONMENT | {"VLLMSPARK_SECRET": "one secret for both machines"}


def command(host: Host, model: Path | str, arguments: Sequence[str]) -> list[str]:
    """`vllm serve MODEL --spark ...` on this host's address."""
    return [program("vllm"), "serve", str(model), "--spark", "--spark-address", host.address, *arguments]


def serve(
    host: Host, model: Path | str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> Process:
    """Runs the command to its end."""
    process = host.popen(command(host, model, arguments), VARIABLES | dict(environment or {}), "vllm serve --spark")
    process.wait(START_SECONDS)
    return process


def assert_sentence(output: str, *parts: str) -> None:
    """Checks the last line, and that nobody had to read a traceback."""
    assert "Traceback" not in output, output[-3000:]
    sentence = output.strip().splitlines()[-1]
    for part in parts:
        assert part in sentence


def assert_refused(process: Process, *parts: str, exit_code: int = 2) -> None:
    """Checks how a command ended, and that nothing of it is left."""
    assert process.exit_code == exit_code, process.output()[-3000:]
    assert_sentence(process.output(), *parts)
    assert_all_gone(process)


ADDRESS = "{address}"


@dataclass(frozen=True)
class Mistake:
    """What a user does wrong, and what the sentence then says.

    Attributes:
        says: parts of the sentence; `ADDRESS` stands for the host's own.
        arguments: of the command.
        environment: variables.
        changes: values in the model's config.json.
        file: what the file given with `--config` holds, in a file of `file_name`; None leaves that file out.
        model: in place of the one that is there; a name alone is a folder with nothing in it.
        temporary: the length of the path of a folder that is made for TMPDIR; 0 leaves the usual one.
    """

    says: Sequence[str]
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, int] = field(default_factory=dict)
    file_name: str = ""
    file: bytes | None = None
    model: str = ""
    temporary: int = 0

    def make(self, host: Host, dense: Path, folder: Path) -> Process:
        """Runs the command that makes it to its end, on ports of its own, with its files in `folder`."""
        arguments = list(self.arguments)
        model: Path | str = dense if not self.model else folder / self.model
        if self.model and not Path(self.model).is_absolute():
            (folder / self.model).mkdir()
        for flag in ("--port", "--spark-port"):
            if flag not in arguments:
                arguments += [flag, str(host.free_port())]
        if self.file_name:
            arguments += ["--config", str(folder / self.file_name)]
        if self.file is not None:
            (folder / self.file_name).write_bytes(self.file)
        if self.changes:
            model = shutil.copytree(dense, folder / "model")
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps(config | dict(self.changes)))
        environment = dict(self.environment)
        if self.temporary:
            place = folder / ("x" * (self.temporary - len(str(folder)) - 1))
            place.mkdir()
            environment["TMPDIR"] = str(place)
        return serve(host, model, arguments, environment)


_CONNECTOR = json.dumps({"kv_connector": "ExampleConnector", "kv_role": "kv_both"})
_HALVES = "cannot be split into two equal halves"

MISTAKES = {
    "flag-misspelt": Mistake(["--spark-prot"], ["--spark-prot", "12"]),
    "one-port-for-both": Mistake(
        ["--port 8123", "--spark-port 8123", "of their own"], ["--spark-port", "8123", "--port", "8123"]
    ),
    "no-such-transport": Mistake(["--spark-transport", "pigeon"], ["--spark-transport", "pigeon"]),
    "no-rdma": Mistake(["--spark-transport verbs", *NO_RDMA], ["--spark-transport", "verbs"]),
    "no-such-rail": Mistake(["--spark-rails mlx5_7:1", "mlx5_7:1"], ["--spark-rails", "mlx5_7:1"]),
    "no-rail": Mistake(["--spark-rails", "mlx5_7:x", "DEVICE:PORT"], ["--spark-rails", "mlx5_7:x"]),
    "tensor-parallel": Mistake(["--tensor-parallel-size 4", "leave it out"], ["--tensor-parallel-size", "4"]),
    "pipeline-parallel": Mistake(["--pipeline-parallel-size 2", "leave it out"], ["--pipeline-parallel-size", "2"]),
    "data-parallel": Mistake(["--data-parallel-size 2", "leave it out"], ["--data-parallel-size", "2"]),
    "decode-context-parallel": Mistake(
        ["--decode-context-parallel-size 2", "leave it out"], ["--decode-context-parallel-size", "2"]
    ),
    "prefill-context-parallel": Mistake(
        ["--prefill-context-parallel-size 2", "leave it out"], ["--prefill-context-parallel-size", "2"]
    ),
    "two-batches": Mistake(["--enable-dbo cannot be used with", "leave it out"], ["--enable-dbo"]),
    "microbatches": Mistake(["--ubatch-size 2 cannot be used with", "leave it out"], ["--ubatch-size", "2"]),
    "moved-experts": Mistake(
        ["xpert parallelism load balancing", "VLLM_LOGGING_LEVEL=DEBUG"], ["--enable-eplb", "--enable-expert-parallel"]
    ),
    "local-copies": Mistake(
        ["--data-parallel-size-local 0 cannot", "leave it out"], ["--data-parallel-size-local", "0"]
    ),
    "balancer": Mistake(["--data-parallel-hybrid-lb cannot", "leave it out"], ["--data-parallel-hybrid-lb"]),
    "fault-tolerance": Mistake(["--enable-fault-tolerance"], ["--enable-fault-tolerance"]),
    "elastic-experts": Mistake(["--enable-elastic-ep cannot be used with", "leave it out"], ["--enable-elastic-ep"]),
    "nodes": Mistake(["--nnodes 2", "vllm-spark join"], ["--nnodes", "2"]),
    "headless": Mistake(["--headless", "vllm-spark join"], ["--headless"]),
    "connector": Mistake(
        ["--kv-transfer-config ExampleConnector", "leave it out"], ["--kv-transfer-config", _CONNECTOR]
    ),
    "kv-offloading": Mistake(["--kv-offloading-size 1.0", "leave it out"], ["--kv-offloading-size", "1"]),
    "model-len": Mistake(["10000000"], ["--max-model-len", "10000000"]),
    "secret-file": Mistake(
        ["/nowhere/secret", "No such file"], ["--spark-secret-file", "/nowhere/secret"], {"VLLMSPARK_SECRET": ""}
    ),
    "secret": Mistake(["5 bytes", "16"], environment={"VLLMSPARK_SECRET": "short"}),
    "old-name": Mistake(
        ["VLLMSPARK_DEPTH and SPARK_DEPTH, its old name, have different values"],
        environment={"VLLMSPARK_DEPTH": "4", "SPARK_DEPTH": "8"},
    ),
    "depth": Mistake(["VLLMSPARK_DEPTH 3", "power of two"], environment={"VLLMSPARK_DEPTH": "3"}),
    "world-size": Mistake(["WORLD_SIZE is 4", "2 ranks"], environment={"WORLD_SIZE": "4"}),
    "no-master": Mistake(["MASTER_ADDR is not set"], environment={"RANK": "1", "WORLD_SIZE": "2"}),
    "unknown-master": Mistake(
        ["MASTER_ADDR=no-such.invalid", "resolved"],
        environment={"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no-such.invalid"},
    ),
    "rank": Mistake(
        ["RANK=5", "RANK 0 and RANK 1"], environment={"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ),
    "heads": Mistake([_HALVES, "attention heads (3)"], changes={"num_attention_heads": 3, "num_key_value_heads": 3}),
    "kv-heads": Mistake(
        [_HALVES, "num_key_value_heads is 3"], changes={"num_attention_heads": 6, "num_key_value_heads": 3}
    ),
    "another-machine": Mistake(["192.0.2.1", ADDRESS], ["--spark-address", "192.0.2.1"]),
    "long-tmpdir": Mistake(["has a path of 255 bytes", "set TMPDIR to a shorter one"], temporary=255),
    # Otherwise a follower would be asked for them first.
    "no-model": Mistake(["there is no folder /nowhere/model"], ["--spark-model-sync", "off"], model="/nowhere/model"),
    "empty-folder": Mistake(["/empty"], model="empty"),
    "width": Mistake([_HALVES, "intermediate_size is 129"], changes={"intermediate_size": 129}),
    "no-draft": Mistake(
        ["there is no folder /nowhere/draft"],
        [
            *("--spark-model-sync", "off"),
            *("--speculative-config", json.dumps({"model": "/nowhere/draft", "num_speculative_tokens": 1})),
        ],
    ),
    "no-mtp": Mistake(
        ["--speculative-config is invalid", "'mtp'"],
        ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 1})],
    ),
    "absent-file": Mistake(["cannot be read", "No such file"], file_name="absent.yaml"),
    "broken-file": Mistake(["is not valid YAML", "line"], file_name="broken.yaml", file=b"spark: [a"),
    "list-in-file": Mistake(["has no options"], file_name="list.yaml", file=b"- spark"),
    "binary-file": Mistake(["cannot be read", "not text"], file_name="binary.yaml", file=b"\xff\xfe\x00"),
    "switch-in-file": Mistake(
        ["has 'maybe' for spark, which is neither true nor false"], file_name="maybe.yaml", file=b"spark: maybe"
    ),
    "flag-misspelt-in-file": Mistake(["--spark-prot"], file_name="misspelt.yaml", file=b"spark-prot: 12"),
}


@pytest.fixture(scope="module")
def attempts(
    host: Host, tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Process]:
    """The mistakes of all selected tests, made; two at a time."""
    functions = [item for item in request.session.items if isinstance(item, pytest.Function)]
    names = [str(item.callspec.params["name"]) for item in functions if item.originalname == test_a_mistake.__name__]
    folders = [tmp_path_factory.mktemp(name) for name in names]
    with ThreadPoolExecutor(max_workers=2) as two:
        made = [
            two.submit(MISTAKES[name].make, host, tiny_dense, folder)
            for name, folder in zip(names, folders, strict=True)
        ]
    return {name: process.result() for name, process in zip(names, made, strict=True)}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake(name: str, host: Host, attempts: dict[str, Process]) -> None:
    assert_refused(attempts[name], *(part.replace(ADDRESS, host.address) for part in MISTAKES[name].says))


def test_ports_in_use(host: Host, tiny_dense: Path) -> None:
    port = host.free_port()
    holder = host.popen([sys.executable, "-c", LISTEN, host.address, str(port)], name="port holder")
    try:
        holder.wait_for_line("up", 20)
        assert_refused(serve(host, tiny_dense, ["--spark-port", str(port)]), str(port), "in use")
        http = ["--host", host.address, "--port", str(port)]
        assert_refused(serve(host, tiny_dense, http), f"--port {port}", "already in use")
    finally:
        holder.kill9()


@pytest.mark.parametrize("way", ["VLLMSPARK_ENABLE", "file"])
def test_other_ways_than_the_flag_to_ask_for_a_pair(host: Host, tiny_dense: Path, tmp_path: Path, way: str) -> None:
    """Seen in what a leader says that has waited in vain."""
    path = tmp_path / "serve.yaml"
    path.write_text("enforce-eager: true\nmax-model-len: 512\n" + ("spark: true\n" if way == "file" else ""))
    port = str(host.free_port())
    process = host.popen(
        [program("vllm"), "serve", str(tiny_dense), "--config", str(path)],
        {
            **CPU_ENVIRONMENT,
            **({"VLLMSPARK_ENABLE": "1"} if way == "VLLMSPARK_ENABLE" else {}),
            **{"VLLMSPARK_ADDRESS": host.address, "VLLMSPARK_PORT": port, "VLLMSPARK_JOIN_TIMEOUT": "0.5"},
            "VLLMSPARK_SECRET": "one secret for both machines",
        },
        "vllm serve",
    )
    process.wait(START_SECONDS)
    assert_refused(process, f"no follower connected to {host.address}:{port} within 0.5 s", exit_code=4)


def test_help(host: Host) -> None:
    """vLLM's own help shows the group, and every setting of the leader in it."""
    process = host.popen([program("vllm"), "serve", "--help=Spark"], CPU_ENVIRONMENT)
    assert process.wait(START_SECONDS) == 0, process.tail()
    output = process.output()
    assert "Serve one model on a pair of machines" in output
    shown = {name for name in SparkConfig.model_fields if f"{flag_name(name)} " in output}
    assert shown == {name for name in SparkConfig.model_fields if side_of(name) != "follower"}


def test_a_flag_beats_the_environment_beats_the_file(host: Host, tiny_dense: Path, tmp_path: Path) -> None:
    """Seen in what a leader says for whom it waits, and how long. A shortened flag is a flag all the same."""
    flag, variable, file = (str(host.free_port()) for _ in range(3))
    path = tmp_path / "serve.yaml"
    path.write_text(
        f"spark-port: {file}\nspark-join-timeout: 600\nspark-address: 192.0.2.1\nenforce-eager: true\n"
        "max-model-len: 512\n"
    )
    environment = {"VLLMSPARK_PORT": variable, "VLLMSPARK_JOIN_TIMEOUT": "0.75"}
    process = serve(host, tiny_dense, ["--config", str(path), "--spark-por", flag], environment)
    assert_refused(
        process, f"no follower connected to {host.address}:{flag} within 0.75 s", "vllm-spark join", exit_code=4
    )
    # A variable with its old name; and what Kubernetes sets for a Service named `spark`.
    old = {"SPARK_JOIN_TIMEOUT": "0.75", "SPARK_PORT": "tcp://10.96.0.7:7077", "SPARK_SERVICE_HOST": "10.96.0.7"}
    process = serve(host, tiny_dense, ["--config", str(path)], old)
    assert_refused(
        process, f"no follower connected to {host.address}:{file} within 0.75 s", "vllm-spark join", exit_code=4
    )
    warning = "will not read; rename SPARK_JOIN_TIMEOUT to VLLMSPARK_JOIN_TIMEOUT."
    assert process.output().count(warning) == 1
