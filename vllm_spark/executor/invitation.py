"""What to type on the other machine, for the messages of the side that waits."""

from __future__ import annotations

from pathlib import Path

from vllm_spark.config import DEFAULT_PORT, SparkConfig, split_endpoint
from vllm_spark.executor.link import is_loopback


def join_command(endpoint: str, secret_file: Path | None) -> str:
    """The command that makes the other machine follow the leader at `endpoint`."""
    return f"vllm-spark join --leader {endpoint}" + (f" --secret-file {secret_file}" if secret_file else "")


def serve_command(host: str, port: int, config: SparkConfig) -> str:
    """The command that makes the machine at `host` a leader that a follower with `config` finds."""
    command = "vllm serve MODEL --spark"
    if not is_loopback(host):
        command += f" --spark-address {host}"
    if port != DEFAULT_PORT:
        command += f" --spark-port {port}"
    if config.secret_file is not None:
        command += f" --spark-secret-file {config.secret_file}"
    return command


def where_to_type(endpoint: str) -> str:
    """Where the other side's command belongs: `on the other machine`, or in another terminal of this one."""
    host, _ = split_endpoint(endpoint)
    return "in another terminal" if is_loopback(host) else "on the other machine"
