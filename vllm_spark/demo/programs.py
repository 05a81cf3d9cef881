"""The command lines that the demo starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_spark.processes.local import LOOPBACK
from vllm_spark.processes.managed import Process

MODEL_NAME = "tiny"


@dataclass(frozen=True)
class Server:
    """A server that is ready at `url`, and the seconds that its start took."""

    url: str
    process: Process
    start_seconds: float


def follower_arguments(spark_port: int) -> list[str]:
    """Arguments of `vllm-spark` on the second machine."""
    return ["join", "--leader", LOOPBACK, "--port", str(spark_port)]


def leader_arguments(spark_port: int) -> list[str]:
    """Arguments of `vllm serve` for the leader."""
    return [
        *("--spark", "--spark-address", LOOPBACK, "--spark-port", str(spark_port)),
        *("--spark-transport", "loopback"),
    ]


def serve_arguments(model: Path, http_port: int) -> list[str]:
    """Arguments of `vllm` with one rank or two."""
    return [
        *("serve", str(model), "--served-model-name", MODEL_NAME),
        *("--host", LOOPBACK, "--port", str(http_port)),
        *("--dtype", "float32"),  # with bfloat16, ties between a random model's logits are common
        *("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16"),
    ]
