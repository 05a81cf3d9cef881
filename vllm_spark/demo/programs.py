"""The programs that the demo starts, as a user types them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_spark.processes.local import LOOPBACK
from vllm_spark.processes.managed import Process

MODEL_NAME = "tiny"


@dataclass(frozen=True)
class Server:
    """A server that answers at `url`, and the seconds that it took until then."""

    url: str
    process: Process
    start_seconds: float


def follower_arguments(spark_port: int) -> list[str]:
    """What follows `vllm-spark` on the second machine."""
    return ["join", "--leader", LOOPBACK, "--port", str(spark_port)]


def leader_arguments(spark_port: int) -> list[str]:
    """What `--spark` adds to `vllm serve`."""
    return [
        *("--spark", "--spark-address", LOOPBACK, "--spark-port", str(spark_port)),
        *("--spark-transport", "loopback"),
    ]


def serve_arguments(model: Path, http_port: int) -> list[str]:
    """What follows `vllm` on any machine, with one rank or two."""
    return [
        *("serve", str(model), "--served-model-name", MODEL_NAME),
        *("--host", LOOPBACK, "--port", str(http_port)),
        *("--dtype", "float32"),  # with bfloat16, ties between a random model's logits are common
        *("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16"),
    ]
