"""What a user can get wrong on the command line ends in one sentence with the value and the remedy, and exit code 2."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from ctypes.util import find_library
from pathlib import Path

import pytest

from vllm_spark.config import SparkConfig, flag_name
from vllm_spark.local_pair import CPU_ENVIRONMENT
from vllm_spark.process import program

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


def serve(
    host: Host, model: Path | str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> Process:
    """`vllm serve MODEL --spark ...` on this host's address, to its end."""
    argv = [program("vllm"), "serve", str(model), "--spark", "--spark-address", host.address, *arguments]
    variables = {"SPARK_SECRET": "one secret for both machines"} | dict(environment or {})
    process = host.popen(argv, CPU_ENVIRONMENT | variables, "vllm serve --spark")
    process.wait(START_SECONDS)
    return process


def assert_refused(process: Process, *parts: str, exit_code: int = 2) -> None:
    """Checks exit code, last line, and that nobody had to read a traceback."""
    output = process.output()
    assert process.exit_code == exit_code, output[-3000:]
    assert "Traceback" not in output, output[-3000:]
    sentence = output.strip().splitlines()[-1]
    for part in parts:
        assert part in sentence
    assert_all_gone(process)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--spark-prot", "12"], ["--spark-prot"]),
        (["--spark-port", "70000"], ["--spark-port", "70000", "65535"]),
        (["--spark-port", "8123", "--port", "8123"], ["--port 8123", "--spark-port 8123", "of their own"]),
        (["--spark-transport", "pigeon"], ["--spark-transport", "pigeon"]),
        (["--spark-transport", "verbs"], ["--spark-transport verbs", *NO_RDMA]),
        (["--spark-rails", "mlx5_7:1"], ["--spark-rails mlx5_7:1", "mlx5_7:1"]),
        (["--spark-rails", "mlx5_7:x"], ["--spark-rails", "mlx5_7:x", "DEVICE:PORT"]),
        (["--spark-slot-kib", "4", "--spark-packet-kib", "8"], ["--spark-packet-kib 8", "--spark-slot-kib 4"]),
        (["--tensor-parallel-size", "4"], ["--tensor-parallel-size 4", "leave it out"]),
        (["--pipeline-parallel-size", "2"], ["--pipeline-parallel-size 2", "leave it out"]),
        (["--data-parallel-size", "2"], ["--data-parallel-size 2", "leave it out"]),
        (["--nnodes", "2"], ["--nnodes 2", "vllm-spark join"]),
        (["--headless"], ["--headless", "vllm-spark join"]),
        (
            ["--kv-transfer-config", json.dumps({"kv_connector": "ExampleConnector", "kv_role": "kv_both"})],
            ["--kv-transfer-config ExampleConnector", "leave it out"],
        ),
        (["--max-model-len", "10000000"], ["10000000"]),
        (["--spark-secret-file", "/nowhere/secret"], ["/nowhere/secret", "No such file"]),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_arguments(host: Host, tiny_dense: Path, arguments: list[str], parts: list[str]) -> None:
    without_variable = {"SPARK_SECRET": ""} if "--spark-secret-file" in arguments else {}
    assert_refused(serve(host, tiny_dense, arguments, without_variable), *parts)


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"SPARK_DEPTH": "3"}, ["SPARK_DEPTH 3", "power of two"]),
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE is 4", "2 ranks"]),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ["MASTER_ADDR is not set"]),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no-such.invalid"},
            ["MASTER_ADDR=no-such.invalid", "resolved"],
        ),
        ({"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, ["RANK=5", "RANK 0 and RANK 1"]),
        ({"SPARK_SECRET": "short"}, ["5 bytes", "16"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_variables(host: Host, tiny_dense: Path, environment: dict[str, str], parts: list[str]) -> None:
    assert_refused(serve(host, tiny_dense, [], environment), *parts)


def test_a_model_that_is_not_there(host: Host, tmp_path: Path) -> None:
    assert_refused(serve(host, "/nowhere/model", []), "there is no folder /nowhere/model")
    (tmp_path / "empty").mkdir()
    assert_refused(serve(host, tmp_path / "empty", []), str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "3"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"intermediate_size": 129}, "intermediate_size is 129"),
    ],
    ids=["heads", "kv-heads", "width"],
)
def test_a_model_that_cannot_be_halved(
    host: Host, tiny_dense: Path, tmp_path: Path, change: dict[str, int], part: str
) -> None:
    model = shutil.copytree(tiny_dense, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    assert_refused(serve(host, model, []), "cannot be cut into two equal halves", part)


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


def test_an_address_of_another_machine(host: Host, tiny_dense: Path) -> None:
    assert_refused(serve(host, tiny_dense, ["--spark-address", "192.0.2.1"]), "192.0.2.1", host.address)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("absent.yaml", None, ["cannot be read", "No such file"]),
        ("broken.yaml", "spark: [a", ["is no YAML", "line"]),
        ("list.yaml", "- spark", ["holds no options"]),
        ("binary.yaml", b"\xff\xfe\x00", ["cannot be read", "not text"]),
        ("misspelt.yaml", "spark-prot: 12", ["--spark-prot"]),
    ],
)
def test_configuration_files(
    host: Host, tiny_dense: Path, tmp_path: Path, name: str, content: str | bytes | None, parts: list[str]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(serve(host, tiny_dense, ["--config", str(path)]), *parts)


@pytest.mark.parametrize("way", ["SPARK_ENABLE", "file"])
def test_other_ways_than_the_flag_to_ask_for_a_pair(host: Host, tiny_dense: Path, tmp_path: Path, way: str) -> None:
    """Seen in what a leader says that has waited in vain."""
    path = tmp_path / "serve.yaml"
    path.write_text("enforce-eager: true\nmax-model-len: 512\n" + ("spark: true\n" if way == "file" else ""))
    port = str(host.free_port())
    process = host.popen(
        [program("vllm"), "serve", str(tiny_dense), "--config", str(path)],
        {
            **CPU_ENVIRONMENT,
            **({"SPARK_ENABLE": "1"} if way == "SPARK_ENABLE" else {}),
            **{"SPARK_ADDRESS": host.address, "SPARK_PORT": port, "SPARK_JOIN_TIMEOUT": "0.5"},
            "SPARK_SECRET": "one secret for both machines",
        },
        "vllm serve",
    )
    process.wait(START_SECONDS)
    assert_refused(process, f"no follower came to {host.address}:{port} within 0.5 s", exit_code=4)


def test_help(host: Host) -> None:
    """vLLM's own help shows the group, and every setting of the leader in it."""
    result = host.run([program("vllm"), "serve", "--help=Spark"], CPU_ENVIRONMENT, timeout=START_SECONDS)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Serve one model on a pair of machines" in result.stdout
    sides = {name: field.json_schema_extra["side"] for name, field in SparkConfig.model_fields.items()}  # type: ignore[index,call-overload]
    shown = {name for name in sides if f"{flag_name(name)} " in result.stdout}
    assert shown == {name for name, side in sides.items() if side != "follower"}


def test_a_flag_beats_the_environment_beats_the_file(host: Host, tiny_dense: Path, tmp_path: Path) -> None:
    """Seen in what a leader says for whom it waits, and how long."""
    flag, variable, file = (str(host.free_port()) for _ in range(3))
    path = tmp_path / "serve.yaml"
    path.write_text(f"spark-port: {file}\nspark-join-timeout: 0.5\nenforce-eager: true\nmax-model-len: 512\n")

    def port_waited_at(arguments: list[str], environment: dict[str, str]) -> str:
        process = serve(host, tiny_dense, ["--config", str(path), *arguments], environment)
        assert_refused(process, "no follower came", "vllm-spark join", exit_code=4)
        return process.output().strip().splitlines()[-1].partition(f"{host.address}:")[2].partition(" ")[0]

    assert port_waited_at([], {}) == file
    assert port_waited_at([], {"SPARK_PORT": variable}) == variable
    assert port_waited_at(["--spark-port", flag], {"SPARK_PORT": variable}) == flag
    assert port_waited_at(["--spark-por", flag], {"SPARK_PORT": variable}) == flag, "shortened, and a flag all the same"
