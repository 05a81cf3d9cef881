"""What one side suggests to type on the other is understood there, and means this pair."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest

from vllm_spark.cli import join
from vllm_spark.config.settings import SparkConfig, add_flags, given_flags
from vllm_spark.executor.channel.addresses import leader_endpoint
from vllm_spark.executor.handshake.messages import join_command, serve_command


@pytest.mark.parametrize("secret_file", [None, Path("/s"), Path("/my own/secret")])
def test_the_suggested_follower_connects_to_the_leader_with_its_secret(secret_file: Path | None) -> None:
    program, command, *words = shlex.split(join_command("10.0.0.1:29651", secret_file))
    parser = argparse.ArgumentParser()
    join.add_arguments(parser)
    config = SparkConfig.resolve(flags=given_flags(parser.parse_args(words)), environment={})
    assert (program, command) == ("vllm-spark", "join")
    assert leader_endpoint(config) == ("10.0.0.1", 29651)
    assert config.secret_file == secret_file


@pytest.mark.parametrize(
    ("host", "port", "secret_file"),
    [("127.0.0.1", 29650, None), ("10.0.0.1", 29650, None), ("10.0.0.1", 5, "/s"), ("10.0.0.1", 5, "/my own/secret")],
)
def test_the_suggested_leader_listens_where_the_follower_connects(
    host: str, port: int, secret_file: str | None
) -> None:
    settings = {} if secret_file is None else {"secret_file": secret_file}
    follower = SparkConfig.resolve(flags=settings, environment={})
    program, command, model, flag, *words = shlex.split(serve_command(host, port, follower))
    parser = argparse.ArgumentParser()
    add_flags(parser, ["leader", "both"], prefix="--spark-")
    leader = SparkConfig.resolve(flags=given_flags(parser.parse_args(words)), environment={})
    assert (program, command, model, flag) == ("vllm", "serve", "MODEL", "--spark")
    assert (leader.address or "127.0.0.1", leader.port) == (host, port)
    assert leader.secret_file == follower.secret_file
