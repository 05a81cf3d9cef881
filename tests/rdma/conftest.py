"""Fixtures: the two machines, whole before and after every test; and what a failure shows."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests import notices

from .machines import CannotRun, Command, Pair, boot, booted, heal

LINES_SHOWN = 40
COMMANDS_SHOWN = 10
MACHINES = pytest.StashKey[Pair]()


@pytest.fixture(scope="package")  # not longer: the tests of other folders need the memory and the processors
def booted_machines(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Pair]:
    """Both machines, booted once for all tests: what one test leaves there, the next one finds."""
    try:
        with booted(tmp_path_factory.mktemp("machines")) as pair:
            pytestconfig.stash[MACHINES] = pair
            yield pair
    except CannotRun as reason:
        notices.add(
            pytestconfig,
            "NO MACHINES WITH RDMA",
            f"{reason}. Everything that runs in the two machines of tests/rdma was skipped.",
        )
        pytest.skip(str(reason))


@pytest.fixture
def machines(booted_machines: Pair) -> Iterator[Pair]:
    """Both machines as after their boot. Afterwards every process is ended and every rail is whole again."""
    boot(booted_machines)
    yield booted_machines
    heal(booted_machines)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds what the last commands in both machines have printed, and both consoles, to the report of a failure."""
    report = yield
    pair = item.config.stash.get(MACHINES, None)
    if report.failed and pair is not None:
        for machine in pair:
            for command in machine.commands[-COMMANDS_SHOWN:]:
                report.sections.append((f"{command} ({_state(command)})", _tail(command.output)))
        for machine in pair:
            report.sections.append((f"console of {machine.name}", _tail(machine.console)))
    return report


def _state(command: Command) -> str:
    return "running" if command.exit_code is None else f"exit code {command.exit_code}"


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-LINES_SHOWN:])
