"""What one side suggests to type on the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_spark.config.settings import SparkConfig
from vllm_spark.executor.handshake.messages import join_command, serve_command


def test_the_follower_is_told_where_and_with_which_secret() -> None:
    assert join_command("127.0.0.1:29650", None) == "vllm-spark join --leader 127.0.0.1:29650"
    with_secret = join_command("10.0.0.1:29650", Path("/s"))
    assert with_secret == "vllm-spark join --leader 10.0.0.1:29650 --secret-file /s"


@pytest.mark.parametrize(
    ("host", "port", "settings", "options"),
    [
        ("127.0.0.1", 29650, {}, ""),
        ("10.0.0.1", 29650, {}, " --spark-address 10.0.0.1"),
        ("10.0.0.1", 5, {"secret_file": "/s"}, " --spark-address 10.0.0.1 --spark-port 5 --spark-secret-file /s"),
    ],
)
def test_the_leader_is_told_all_that_is_not_a_default(
    host: str, port: int, settings: dict[str, str], options: str
) -> None:
    config = SparkConfig.resolve(flags=settings, environment={})
    assert serve_command(host, port, config) == f"vllm serve MODEL --spark{options}"
