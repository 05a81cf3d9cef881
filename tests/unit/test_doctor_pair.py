"""Two machines together: what only both show, and the doctor's visit over a real connection with real TLS."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor import network_path, pair
from vllm_spark.doctor.checks import MachineReport, run_checks
from vllm_spark.doctor.finding import Finding
from vllm_spark.doctor.model.question import ModelQuestion
from vllm_spark.doctor.pair import compare
from vllm_spark.doctor.remote import CheckRequest, request_report, send_report
from vllm_spark.doctor.report import Report
from vllm_spark.doctor.system import System
from vllm_spark.errors import ConfigurationError, PeerLostError, RefusedError
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.framing import Connection, Frame, Kind
from vllm_spark.executor.handshake.client import Connector
from vllm_spark.executor.handshake.messages import CONTROL
from vllm_spark.executor.handshake.versions import Versions
from vllm_spark.processes.local import free_ports
from vllm_spark.records import from_json, to_json

from .gb10_tree import Tree, gb10
from .test_doctor import assert_complete, shown

SECRET = "one secret, long enough"
LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLMSPARK_SECRET", SECRET)


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Tree, Tree]:
    first, second = gb10(tmp_path / "one", 1), gb10(tmp_path / "two", 2)
    first.answering("10.0.0.2", "10.0.1.2")
    return first, second


def together(
    trees: tuple[Tree, Tree], change: Callable[[MachineReport], MachineReport] = lambda machine: machine
) -> dict[str, Finding]:
    machines = [run_checks(tree.system, SparkConfig()) for tree in trees]
    theirs = change(from_json(to_json(machines[1]), MachineReport))
    found = list(compare(trees[0].system, machines[0], theirs))
    for one in found:
        assert_complete(one)
    return {one.id: one for one in found}


# --- both together ---------------------------------------------------------------------------------------------------


def test_a_healthy_pair(trees: tuple[Tree, Tree]) -> None:
    found = together(trees)
    assert {one.status for one in found.values()} == {"ok"}
    assert found.keys() == {"pair.versions", "pair.rails", "pair.mtu", "pair.ping"}
    assert "rocep1s0f0 10.0.0.1 to rocep1s0f0 10.0.0.2" in found["pair.rails"].value
    assert "roceP2p1s0f0 10.0.1.1 to roceP2p1s0f0 10.0.1.2" in found["pair.rails"].value
    assert "enp1s0f0np0 to 10.0.0.2 0.083 ms" in found["pair.ping"].value


def other_mtu(one: Tree, other: Tree) -> None:
    other.mtu("enp1s0f0np0", 1500)


def another_network(one: Tree, other: Tree) -> None:
    other.addresses({"rocep1s0f0": "10.7.0.2/24", "roceP2p1s0f0": "10.7.1.2/24"})


def no_network_in_common(one: Tree, other: Tree) -> None:
    another_network(one, other)
    for tree in (one, other):
        for index in (0, 1):  # the link-local addresses
            tree.remove(f"sys/class/infiniband/*/ports/1/gids/{index}")


def one_in_another_network(one: Tree, other: Tree) -> None:
    other.addresses({"rocep1s0f0": "10.0.0.2/24", "roceP2p1s0f0": "10.7.1.2/24"})


def crossed(one: Tree, other: Tree) -> None:
    other.addresses({"rocep1s0f0": "10.0.1.2/24", "roceP2p1s0f0": "10.0.0.2/24"})


def no_answer(one: Tree, other: Tree) -> None:
    one.answering("10.0.0.2")


def small_switch(one: Tree, other: Tree) -> None:
    one.answering("10.0.0.2", "10.0.1.2", largest=1500)


def no_ping(one: Tree, other: Tree) -> None:
    one.remove("usr/bin/ping")


@pytest.mark.parametrize(
    ("fault", "name", "status", "parts"),
    [
        (
            other_mtu,
            "pair.mtu",
            "warning",
            ["enp1s0f0np0 9000, enp1s0f0np0 1500 there", "set dev enp1s0f0np0 mtu 9000"],
        ),
        (another_network, "pair.rails", "warning", ["rocep1s0f0 fe80::1 to", "link-local", "10.0.1.1/24"]),
        (no_network_in_common, "pair.rails", "problem", ["none", "10.7.0.2/24", "10.0.0.1/24"]),
        (one_in_another_network, "pair.rails", "warning", ["to rocep1s0f0 10.0.0.2", "10.7.1.2/24"]),
        (crossed, "pair.rails", "ok", ["rocep1s0f0 10.0.0.1 to roceP2p1s0f0 10.0.0.2"]),
        (no_answer, "pair.ping", "problem", ["10.0.1.2: no answer", "ping -n", "-I enP2p1s0f0np0 10.0.1.2"]),
        (small_switch, "pair.ping", "problem", ["10.0.0.2: no packets of 9000 bytes", "-M do -s 8972"]),
        (no_ping, "pair.ping", "unknown", ["iputils-ping"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_fault_of_the_pair(
    trees: tuple[Tree, Tree], fault: Callable[[Tree, Tree], None], name: str, status: str, parts: list[str]
) -> None:
    fault(*trees)
    found = together(trees)[name]
    assert found.status == status
    for part in parts:
        assert part in f"{found.value}\n{found.explanation}\n{found.remedy}"


def test_machines_of_one_name_are_told_apart(trees: tuple[Tree, Tree]) -> None:
    mine, theirs = (run_checks(tree.system, SparkConfig()) for tree in trees)
    assert mine.host == theirs.host
    here, there = pair.distinguish_hosts(mine, theirs, "10.0.0.1", "10.0.0.2")
    assert (here.host, there.host) == (f"{mine.host} (10.0.0.1)", f"{mine.host} (10.0.0.2)")
    text = shown(Report.of(here, there, []), 200)
    assert f"{mine.host} (10.0.0.1) (here)" in text
    assert f"{mine.host} (10.0.0.2) (there)" in text
    assert pair.distinguish_hosts(mine, theirs, "127.0.0.1", "127.0.0.1") == (mine, theirs)
    other = dataclasses.replace(theirs, host="desk2")
    assert pair.distinguish_hosts(mine, other, "10.0.0.1", "10.0.0.2") == (mine, other)


def test_nobody_at_a_loopback_address() -> None:
    """The command belongs in another terminal there, and is a line of its own as for another machine."""
    port = free_ports(1)[0]
    with pytest.raises(PeerLostError) as caught:
        request_report(SparkConfig(address="127.0.0.1", port=port), 0.1)
    finding = pair.peer_missing(str(caught.value))
    assert finding.remedy == f"vllm-spark join --leader 127.0.0.1:{port}   # in another terminal"
    assert finding.explanation == f"No follower connected to 127.0.0.1:{port} within 0.1 s."


def test_each_rail_has_its_own_command_in_a_line(trees: tuple[Tree, Tree]) -> None:
    """One rail is dead, and the other carries small packets only."""
    trees[0].answering("10.0.1.2", largest=1500)
    remedy = together(trees)["pair.ping"].remedy.splitlines()
    assert [(line.split()[0], line.split()[-1]) for line in remedy] == [("ping", "10.0.0.2"), ("ping", "10.0.1.2")]


def test_without_the_native_module_the_rest_is_still_told(
    trees: tuple[Tree, Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm_spark.collective", None)
    found = together(trees)
    assert found["pair.versions"].status == "ok"
    assert (found["pair.rails"].status, found["pair.rails"].remedy[:13]) == ("unknown", "pip install .")


def test_a_comparison_that_stumbles_leaves_the_others(
    trees: tuple[Tree, Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair, "_pings", lambda system, pairs: 1 / 0)
    found = together(trees)
    assert {"pair.versions", "pair.rails", "pair.mtu"} <= found.keys()
    assert found["pair"].value.startswith("ZeroDivisionError")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Versions)])
def test_other_versions(trees: tuple[Tree, Tree], field: str) -> None:
    def change(machine: MachineReport) -> MachineReport:
        versions = dataclasses.replace(machine.versions, **{field: "0.0.1"})
        return dataclasses.replace(machine, host="desk2", versions=versions)

    found = together(trees, change)["pair.versions"]
    assert found.status == "problem"
    assert f"{field} is " in found.value
    assert "0.0.1 on desk2" in found.value


def test_nothing_is_said_of_rails_where_one_side_has_none(trees: tuple[Tree, Tree]) -> None:
    shutil.rmtree(trees[1].root / "sys/class/infiniband")
    assert together(trees).keys() == {"pair.versions"}


def test_side_by_side(trees: tuple[Tree, Tree]) -> None:
    other_mtu(*trees)
    one, other = (run_checks(tree.system, SparkConfig(), thorough=True) for tree in trees)
    other = dataclasses.replace(other, host="desk2")
    report = Report.of(one, other, list(compare(trees[0].system, one, other)))
    text = shown(report, width=160)
    row = next(line for line in text.splitlines() if line.startswith("  MTU of the interfaces"))
    assert "ok enP2p1s0f0np0 9000, enp1s0f0np0 9000" in row
    assert "warning enP2p1s0f0np0 9000, enp1s0f0np0 1500" in row
    assert "MTU of the interfaces, desk2" in text
    assert text.count("Same MTU on both: ") == 1


@pytest.mark.parametrize(
    ("ahead", "status", "parts"),
    [
        (0.4, "ok", ["less than 1 s apart"]),
        (-7.0, "note", ["desk2 is 7.0 s behind this machine", "both logs", "timedatectl set-ntp true"]),
        (7200.0, "warning", ["desk2 is 7,200.0 s ahead of this machine", "downloads"]),
    ],
)
def test_clocks(ahead: float, status: str, parts: list[str]) -> None:
    found = network_path.check_clocks("desk2", ahead)
    assert_complete(found)
    assert found.status == status
    for part in parts:
        assert part in f"{found.value}\n{found.explanation}\n{found.remedy}"


def test_a_clock_that_is_behind_is_seen_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Finding] = []
    port, outcome = visiting(found=seen.append)
    connection = called(follower(port))
    question = connection.expect(Kind.CHECK_REQUEST, timeout=30)
    machine = run_checks(System(), SparkConfig())
    late = dataclasses.replace(machine, host="desk2", path_probe=network_path.PathProbe(time.time() - 3600, 0, None))
    connection.send(Kind.CHECK_REPORT, to_json(late))
    connection.expect(Kind.LEAVE, timeout=30)
    outcome.result(30)
    assert [one.value for one in seen if one.id == "pair.clocks"] == ["desk2 is 3,600.0 s behind this machine"]
    assert question.kind is Kind.CHECK_REQUEST


@pytest.mark.parametrize("cpu", [True, False])
def test_ports_that_a_firewall_closes(cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_path, "is_cpu_build", lambda: cpu)
    found = network_path.check_ports("desk2", False, True)
    assert (found.status, found.value) == ("note" if cpu else "problem", "closed from here to desk2")
    assert "# there" in found.remedy
    assert network_path.check_ports("desk2", False, False).value == "closed from here to desk2 and from desk2 to here"
    assert "# here" in network_path.check_ports("desk2", True, False).remedy


# --- the visit -------------------------------------------------------------------------------------------------------


def follower(port: int, secret: str = SECRET) -> Connector:
    return Connector("127.0.0.1", port, tls_context(secret.encode(), "follower"), LIMIT)


def called(caller: Connector) -> Connection:
    """Like vllm-spark join: looks until somebody listens, for a minute."""
    end = time.monotonic() + 60
    while (connection := caller.connect(CONTROL)) is None:
        assert time.monotonic() < end, f"nobody listens at {caller.endpoint}"
        time.sleep(0.05)
    return connection


def visiting(
    patience: float = 60.0, model: ModelQuestion | None = None, found: Callable[[Finding], None] = lambda finding: None
) -> tuple[int, Any]:
    """A doctor in a thread of its own: its port, and its outcome to come."""
    (port,) = free_ports(1)
    pool = ThreadPoolExecutor(1)
    outcome = pool.submit(request_report, SparkConfig(address="127.0.0.1", port=port), patience, model, found)
    pool.shutdown(wait=False)
    return port, outcome


def test_a_follower_is_examined_and_let_go() -> None:
    seen: list[Finding] = []
    port, outcome = visiting(found=seen.append)
    caller = follower(port)
    connection = called(caller)
    question = connection.expect(Kind.CHECK_REQUEST, timeout=30)
    # It would not find the doctor again if it looked for a leader now.
    assert caller.connect(CONTROL) is None
    send_report(connection, question, SparkConfig(), "127.0.0.1")
    machine, address = outcome.result(30)
    assert address == "127.0.0.1"
    assert [(one.id, one.status) for one in seen] == [("pair.clocks", "ok"), ("pair.ports", "ok")]
    assert machine.versions == Versions.of_this_process()
    assert {"rdma.devices", "software.vllm"} <= {found.id for found in machine.findings}


def test_a_follower_of_another_version_is_examined_too() -> None:
    """A leader would refuse it, and it would end; the doctor is there to say why."""
    port, outcome = visiting()
    caller = follower(port)
    caller._versions = dataclasses.replace(caller._versions, vllm="0.0.1")
    connection = called(caller)
    send_report(connection, connection.expect(Kind.CHECK_REQUEST, timeout=30), SparkConfig(), "127.0.0.1")
    outcome.result(30)


def test_a_second_follower_does_not_disturb() -> None:
    port, outcome = visiting()
    connection = called(follower(port))
    question = connection.expect(Kind.CHECK_REQUEST, timeout=30)
    assert follower(port).connect(CONTROL) is None
    send_report(connection, question, SparkConfig(), "127.0.0.1")
    outcome.result(30)


def test_another_secret_is_named() -> None:
    port, outcome = visiting(patience=5)
    with pytest.raises(ConfigurationError, match="another secret"):
        called(follower(port, "another one, as long"))
    with pytest.raises(PeerLostError, match=r"within 5 s; .*another secret.*vllm-spark join --leader"):
        outcome.result(30)


@pytest.mark.parametrize(
    "reply", [None, (Kind.CHECK_REPORT, b"{}"), (Kind.HEARTBEAT, b"")], ids=["none", "empty", "other"]
)
def test_a_follower_that_does_not_answer(reply: tuple[Kind, bytes] | None) -> None:
    port, outcome = visiting()
    connection = called(follower(port))
    connection.expect(Kind.CHECK_REQUEST, timeout=30)
    if reply is not None:
        connection.send(*reply)
    connection.close()
    with pytest.raises(PeerLostError, match="see the output of its vllm-spark join"):
        outcome.result(30)


def test_findings_are_never_unpickled() -> None:
    import pickle

    port, outcome = visiting()
    connection = called(follower(port))
    connection.expect(Kind.CHECK_REQUEST, timeout=30)
    connection.send(Kind.CHECK_REPORT, pickle.dumps({"host": "x"}))
    with pytest.raises(PeerLostError, match="CHECK_REPORT message could not be read"):
        outcome.result(30)
    connection.close()


def test_a_question_that_is_none() -> None:
    port, outcome = visiting()
    connection = called(follower(port))
    connection.expect(Kind.CHECK_REQUEST, timeout=30)
    with pytest.raises(PeerLostError, match="CHECK_REQUEST message could not be read"):
        send_report(connection, Frame(Kind.CHECK_REQUEST, b"[]"), SparkConfig(), "127.0.0.1")
    connection.close()
    assert outcome.exception(30) is not None
    assert to_json(CheckRequest("desk1")) == b'{"host":"desk1","model":null,"port":0}'


def test_a_leader_still_refuses_another_version() -> None:
    """Only the doctor takes whoever comes."""
    from vllm_spark.executor.handshake.server import Listener

    listener = Listener("127.0.0.1", 0, tls_context(SECRET.encode(), "leader"), LIMIT)
    caller = follower(int(listener.endpoint.rpartition(":")[2]))
    caller._versions = dataclasses.replace(caller._versions, vllm="0.0.1")
    with pytest.raises(RefusedError, match=r"vllm is .* on the leader and 0\.0\.1 on the follower"):
        called(caller)
    listener.close()
