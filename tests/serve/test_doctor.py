"""`vllm-spark doctor --peer` beside a real `vllm-spark join` on the other host, which afterwards follows a leader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_spark.errors import EXIT_PROBLEM
from vllm_spark.processes.local import CPU_ENVIRONMENT
from vllm_spark.processes.managed import program

from . import prompts
from .hosts import Hosts
from .process import Process, assert_all_gone
from .servers import spark_leader

SECRET = {"VLLMSPARK_SECRET": "the secret of both machines"}
ANSWER_SECONDS = 120.0
"""Bound for a follower to start, which imports vLLM, and to be examined, on a busy machine."""


class Waiting:
    """A follower that waits, and the port at which it looks for a leader."""

    def __init__(self, process: Process, port: str) -> None:
        self.process, self.port = process, port


def start_follower(hosts: Hosts, *arguments: str, secret: dict[str, str] = SECRET) -> Waiting:
    port = str(hosts[0].free_port())
    argv = [program("vllm-spark"), "join", "--leader", hosts[0].address, "--port", port, *arguments]
    return Waiting(hosts[1].popen(argv, CPU_ENVIRONMENT | secret, "vllm-spark join"), port)


@pytest.fixture
def made_secret(hosts: Hosts, tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has typed `vllm-spark doctor --make-secret`."""
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert hosts[0].run([program("vllm-spark"), "doctor", "--make-secret"], environment).returncode == 0
    return environment


@pytest.fixture
def follower(hosts: Hosts) -> Iterator[Waiting]:
    waiting = start_follower(hosts)
    yield waiting
    waiting.process.terminate()


def doctor(hosts: Hosts, port: str, *arguments: str, secret: dict[str, str] = SECRET) -> Process:
    """`vllm-spark doctor --peer` on the first host, to its end."""
    argv = [program("vllm-spark"), "doctor", "--peer", "--spark-address", hosts[0].address, "--spark-port", port]
    process = hosts[0].popen([*argv, *arguments], secret, "vllm-spark doctor")
    process.wait(ANSWER_SECONDS + 30)
    assert "Traceback" not in process.output()
    assert_all_gone(process)
    return process


def test_both_machines_side_by_side_and_then_a_leader(
    hosts: Hosts, made_secret: dict[str, str], tiny_moe: Path, reference_tokens: list[list[int]]
) -> None:
    """Two doctors and a leader, one after the other, are served by one join; all find the secret by themselves."""
    follower = start_follower(hosts, secret=made_secret)
    wait = ("--wait", str(ANSWER_SECONDS))
    first = doctor(hosts, follower.port, "--json", *wait, secret=made_secret)
    report = json.loads(first.output().splitlines()[-1])
    assert first.exit_code == report["exit_code"] == EXIT_PROBLEM  # neither host has an RDMA device
    assert report["peer"]["versions"] == report["machine"]["versions"]
    for machine in (report["machine"], report["peer"]):
        findings = {found["id"]: found for found in machine["findings"]}
        assert findings["rdma.devices"]["status"] == "problem"
        assert findings["software.vllm"]["status"] == "ok"
        assert "A check that failed" not in [found["title"] for found in machine["findings"]]
    assert [found["status"] for found in report["pair"] if found["id"] == "pair.versions"] == ["ok"]

    second = doctor(hosts, follower.port, *wait, secret=made_secret)
    assert second.exit_code == EXIT_PROBLEM
    for part in ("(here)", "(there)", "PROBLEM RDMA devices", "Same versions", "vLLM"):
        assert part in second.output()

    assert follower.process.exit_code is None
    assert follower.process.output().count("requests a report of this machine") == 2
    with spark_leader(hosts, tiny_moe, follower.port, env=made_secret) as server:
        assert prompts.greedy_tokens(server.client, prompts.PROMPTS[:2]) == reference_tokens[:2]
        server.leader.terminate()
    follower.process.terminate()


def test_a_doctor_is_no_leader_for_a_follower_that_follows_once(hosts: Hosts) -> None:
    waiting = start_follower(hosts, "--once")
    assert doctor(hosts, waiting.port, "--wait", str(ANSWER_SECONDS)).exit_code == EXIT_PROBLEM
    waiting.process.wait_for_line(r"(?s)requests a report of this machine.*Waiting for a leader", 30)
    assert waiting.process.exit_code is None
    waiting.process.terminate()


def test_nobody_comes(hosts: Hosts) -> None:
    process = doctor(hosts, str(hosts[0].free_port()), "--wait", "1")
    assert process.exit_code == EXIT_PROBLEM
    assert "PROBLEM The other machine: not connected" in process.output()
    assert f"> vllm-spark join --leader {hosts[0].address}:" in process.output()


def test_another_secret_ends_the_follower_and_is_named_by_the_doctor(hosts: Hosts, follower: Waiting) -> None:
    follower.process.wait_for_line("Waiting for a leader", ANSWER_SECONDS)
    other = {"VLLMSPARK_SECRET": "another one, also long"}
    process = doctor(hosts, follower.port, "--wait", str(ANSWER_SECONDS / 4), secret=other)
    assert process.exit_code == EXIT_PROBLEM
    assert "PROBLEM The other machine: has another secret" in process.output()
    assert "> set VLLMSPARK_SECRET to the same value on both machines" in process.output()
    assert "ufw allow" not in process.output(), "its connection arrived"
    assert follower.process.wait(ANSWER_SECONDS) == 2


def test_without_a_secret_nobody_is_waited_for(hosts: Hosts, tmp_path: Path) -> None:
    if hosts[0].namespace is None:
        pytest.skip("on a loopback address none is needed")
    process = doctor(hosts, str(hosts[0].free_port()), secret={"XDG_CONFIG_HOME": str(tmp_path)})
    assert process.exit_code == EXIT_PROBLEM
    assert "PROBLEM Shared secret: none" in process.output()
    assert "> vllm-spark doctor --make-secret" in process.output()
    assert "make one with `vllm-spark doctor --make-secret`" in " ".join(process.output().split())
    assert "Waiting for the follower" not in process.output()


def pair_findings(hosts: Hosts, follower: Waiting) -> dict[str, dict[str, str]]:
    """What a doctor on the first host finds between both."""
    process = doctor(hosts, follower.port, "--json", "--wait", str(ANSWER_SECONDS))
    return {found["id"]: found for found in json.loads(process.output().splitlines()[-1])["pair"]}


WAYS = {"pair.packets", "pair.ports", "pair.clocks"}


def test_the_path_between_both_machines(namespaces: Hosts) -> None:
    """Nothing is found on a healthy pair; a firewall, and a bridge that drops full packets, are."""
    first, second = namespaces
    follower = start_follower(namespaces)
    try:
        healthy = pair_findings(namespaces, follower)
        assert {healthy[name]["status"] for name in WAYS} == {"ok"}, healthy
        assert healthy["pair.packets"]["value"] == f"1500 bytes, eth0 to {second.address} and back"
        with second.firewall(int(follower.port)):
            assert pair_findings(namespaces, follower)["pair.ports"]["value"].startswith("closed from here to ")
        with first.firewall(int(follower.port)):
            assert pair_findings(namespaces, follower)["pair.ports"]["value"].endswith(" to here")
        for host in namespaces:  # the bridge stays at 1500
            assert host.run(["ip", "link", "set", "eth0", "mtu", "9000"]).returncode == 0
        cut = pair_findings(namespaces, follower)["pair.packets"]
        assert cut["status"] == "problem"
        assert cut["value"] == f"9000 bytes of eth0 are lost on the way to {second.address}, 1500 arrive"
    finally:
        for host in namespaces:
            host.run(["ip", "link", "set", "eth0", "mtu", "1500"])
        follower.process.terminate()
