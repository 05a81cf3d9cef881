"""A pair needs one port of the leader's machine and no other, either way."""

from __future__ import annotations

from pathlib import Path

from vllm_spark.local_pair import CPU_ENVIRONMENT
from vllm_spark.process import program

from . import prompts
from .hosts import Hosts
from .process import Process, assert_all_gone
from .servers import spark_leader

SECRET = {"SPARK_SECRET": "the secret of both machines"}
NOTE_SECONDS = 90.0
"""Bound for a process to start and to say once for whom it waits."""


def join(hosts: Hosts, port: int) -> Process:
    argv = [program("vllm-spark"), "join", "--leader", hosts[0].address, "--port", str(port), "--once"]
    return hosts[1].popen(argv, CPU_ENVIRONMENT | SECRET, "vllm-spark join")


def test_a_firewall_that_lets_one_port_through(
    namespaces: Hosts, tiny_moe: Path, reference_tokens: list[list[int]]
) -> None:
    """On both machines: the pair starts, answers as one rank does, and nothing else of it listens."""
    first, second = namespaces
    port = first.free_port()
    before = first.listening(), second.listening()
    with first.firewall(port), second.firewall(port):
        follower = join(namespaces, port)
        with spark_leader(namespaces, tiny_moe, str(port), env=SECRET) as server:
            assert prompts.greedy_tokens(server.client, prompts.PROMPTS[:2]) == reference_tokens[:2]
            assert set(server.metrics()["vllm_spark_fallbacks_total"].values()) == {0}
            for_clients = server.url.removeprefix("http://")
            assert first.listening() - before[0] == {for_clients, f"{first.address}:{port}"}
            assert second.listening() - before[1] == set()
        assert follower.wait(30) == 0
    assert_all_gone(follower)


def test_a_firewall_that_lets_nothing_through(namespaces: Hosts, tiny_moe: Path) -> None:
    """Both sides say so, and how to open the port; the leader stops waiting when it was told to."""
    first, _ = namespaces
    port = first.free_port()
    with first.firewall(None):
        follower = join(namespaces, port)
        waiting = ["--spark-join-timeout", "40"]
        with spark_leader(namespaces, tiny_moe, str(port), waiting, SECRET, wait=False) as server:
            follower.wait_for_line(f"{first.address}:{port} does not answer: .* firewall", NOTE_SECONDS)
            assert server.leader.wait(NOTE_SECONDS) == 4
            sentence = server.leader.output().splitlines()[-1]
            assert f"no follower came to {first.address}:{port} within 40 s" in sentence
            assert f"let TCP port {port} through" in sentence
        assert follower.exit_code is None
        follower.terminate()
