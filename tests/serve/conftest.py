"""Fixtures: two hosts, tiny models, servers that several tests share; and what a failure shows."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import notices
from vllm_spark.models.tiny import make_tiny_model

from . import process, prompts
from .hosts import Host, Hosts, two_hosts
from .servers import Server, spark_tp2, stock_tp1

LINES_SHOWN = 40


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the output of every process of the session."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def hosts(logs: Path, pytestconfig: pytest.Config) -> Iterator[Hosts]:
    """Two hosts: network namespaces, or 127.0.0.1 and 127.0.0.2 where those cannot be made."""
    with two_hosts(logs) as (pair, reason):
        if reason is not None:
            notices.add(
                pytestconfig,
                "TWO HOSTS WITHOUT NETWORK NAMESPACES",
                f"{reason}: the two hosts were 127.0.0.1 and 127.0.0.2, and tests that pull cables were skipped.",
            )
        with pair[0].fork_server(), pair[1].fork_server():
            yield pair


@pytest.fixture
def namespaces(hosts: Hosts) -> Hosts:
    """The two hosts, for tests that pull cables: skips where hosts are only loopback addresses."""
    if hosts[0].namespace is None:
        pytest.skip("needs network namespaces: run as root with iproute2 installed")
    return hosts


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder for processes that make sockets in theirs: pytest's own paths are too long for one, with the
    names of the worker and of the test."""
    with tempfile.TemporaryDirectory(prefix="vsp") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def host(hosts: Hosts) -> Host:
    """The first host, where one is enough."""
    return hosts[0]


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-moe", "moe")


@pytest.fixture(scope="session")
def tiny_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-dense", "dense")


@dataclass(frozen=True)
class OneRank:
    """What one stock rank, with the plugin installed and no `--spark`, answered and had in its memory.

    Attributes:
        tokens: greedy answers to `prompts.PROMPTS`.
        maps: of the server and of what it started, process id -> /proc/PID/maps.
    """

    tokens: list[list[int]]
    maps: dict[int, str]


@pytest.fixture(scope="session")
def one_rank(host: Host, tiny_moe: Path) -> OneRank:
    """The tiny MoE, served by one rank."""
    with stock_tp1(host, tiny_moe, cold=True) as server:
        tokens = prompts.greedy_tokens(server.client)
        pids = [server.leader.pid, *(child.pid for child in server.leader.descendants())]
        return OneRank(tokens, {pid: Path(f"/proc/{pid}/maps").read_text() for pid in pids})


@pytest.fixture(scope="session")
def reference_tokens(one_rank: OneRank) -> list[list[int]]:
    """What every pair must answer to `prompts.PROMPTS`, to the last id."""
    return one_rank.tokens


@pytest.fixture(scope="module")
def pair(hosts: Hosts, tiny_moe: Path) -> Iterator[Server]:
    """The tiny MoE under `--spark` on the two hosts, shared by the tests of one module."""
    with spark_tp2(hosts, tiny_moe) as server:
        yield server


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the last lines of every known process to the report of a failure."""
    report = yield
    if report.failed:
        for program in process.started:
            report.sections.append((f"{program.name} ({_state(program)}), {program.log}", program.tail(LINES_SHOWN)))
    return report


def _state(program: process.Process) -> str:
    try:
        return "running" if program.exit_code is None else f"exit code {program.exit_code}"
    except process.ProcessError as error:
        return str(error)  # nothing may keep the other tests from running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """After a module and its fixtures, ends what its tests have left running."""
    try:
        return (yield)
    finally:
        if nextitem is None or nextitem.path != item.path:
            process.end_all()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """The same for a session that ended early."""
    process.end_all()
