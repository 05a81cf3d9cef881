"""A pair needs one port of the leader's machine and no other, either way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_spark.errors import EXIT_PROBLEM
from vllm_spark.processes.local import CPU_ENVIRONMENT
from vllm_spark.processes.managed import program

from . import prompts
from .hosts import Host, Hosts
from .process import Process, assert_all_gone
from .servers import spark_leader

SECRET = {"VLLMSPARK_SECRET": "the secret of both machines"}
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


@contextmanager
def default_route(host: Host) -> Iterator[None]:
    """As if the link were an office network."""
    route = ["default", "via", f"{host.address.rpartition('.')[0]}.254"]
    assert host.run(["ip", "route", "add", *route]).returncode == 0
    try:
        yield
    finally:
        host.run(["ip", "route", "delete", *route])


@pytest.mark.thorough
def test_a_firewall_that_lets_nothing_through(namespaces: Hosts, tiny_moe: Path) -> None:
    """Both sides say so, and how to open the port; the leader stops waiting when it was told to.

    Its address is on an interface with the default route, which it says once.
    """
    first, _ = namespaces
    port = first.free_port()
    with first.firewall(None), default_route(first):
        follower = join(namespaces, port)
        waiting = ["--spark-join-timeout", "40"]
        with spark_leader(namespaces, tiny_moe, str(port), waiting, SECRET, wait=False) as server:
            follower.wait_for_line(f"{first.address}:{port} does not answer: .* firewall", NOTE_SECONDS)
            assert server.leader.wait(NOTE_SECONDS) == 4
            sentence = server.leader.output().splitlines()[-1]
            assert f"no follower connected to {first.address}:{port} within 40 s" in sentence
            assert f"allow TCP port {port} in the firewall" in sentence
            warned = [line for line in server.leader.output().splitlines() if "has the default route" in line]
            assert len(warned) == 1
            assert f"The link's address {first.address} is on {first.interface}, which has the" in warned[0]
            assert "neither encrypted nor authenticated" in warned[0]
        assert follower.exit_code is None
        follower.terminate()


def doctor(host: Host, *arguments: str) -> dict[str, dict[str, str]]:
    """What `vllm-spark doctor` finds on a host, and with `--peer` on both, by its id."""
    done = host.run([program("vllm-spark"), "doctor", "--json", *arguments], SECRET, timeout=NOTE_SECONDS)
    report = json.loads(done.stdout)
    assert done.returncode == report["exit_code"] == EXIT_PROBLEM  # neither host has an RDMA device
    return {found["id"]: found for found in [*report["machine"]["findings"], *report["pair"]]}


def test_the_doctor_of_the_second_machine_finds_the_firewall(namespaces: Hosts) -> None:
    first, second = namespaces
    port = str(first.free_port())
    leader = ("--leader", f"{first.address}:{port}")
    assert "nothing listens there now" in doctor(second, *leader)["link.port"]["value"]
    with first.firewall(None):
        found = doctor(second, *leader)["link.port"]
    assert found["status"] == "problem"
    assert found["value"] == f"{first.address}:{port}: no answer"
    assert "a firewall there" in found["explanation"]
    assert f"sudo ufw allow in to any port {port} proto tcp" in found["remedy"]


def test_the_doctor_of_the_first_machine_names_the_firewall_and_what_opens_it(namespaces: Hosts) -> None:
    first, _ = namespaces
    port = first.free_port()
    follower = join(namespaces, port)
    follower.wait_for_line("Waiting for a leader", NOTE_SECONDS)
    here = ("--peer", "--spark-address", first.address, "--spark-port", str(port))
    with first.firewall(None):
        found = doctor(first, *here, "--wait", "8")["pair.peer"]
    assert found["status"] == "problem"
    assert f"allow TCP port {port} in the firewall of this machine" in found["explanation"]
    assert f"sudo ufw allow in on {first.interface} to any port {port} proto tcp   # here" in found["remedy"]
    with first.firewall(port):
        found = doctor(first, *here, "--wait", str(NOTE_SECONDS - 20))["pair.port"]
    assert (found["status"], found["value"].partition(", from ")[0]) == ("ok", f"{first.address}:{port}")
    follower.terminate()
