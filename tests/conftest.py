"""Leaves out the thorough tests where they were not asked for, and shares out the tests among workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from . import notices
from .thorough import THOROUGH

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.workermanage import WorkerController

    from .distribution import Distribution


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        from .distribution import rank_of

        items.sort(key=lambda item: rank_of(item.nodeid))
    if THOROUGH:
        return
    for item in items:
        if item.get_closest_marker("thorough") is not None:
            item.add_marker(pytest.mark.skip(reason="thorough; run it with VLLMSPARK_THOROUGH=1"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Distribution:
    from .distribution import Distribution

    return Distribution(config, log)


def pytest_sessionfinish(session: pytest.Session) -> None:
    notices.hand_over(session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController) -> None:
    notices.take_over(node.config, node)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    notices.show(terminalreporter, config)
