"""Which worker of pytest-xdist runs which tests.

A unit of work is a file, or a folder whose fixtures take long: the two virtual machines of tests/rdma and the two hosts
of tests/serve and of tests/models, with their fork servers, are made once. A worker takes the next unit when it has two
tests left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import NodeManager

if TYPE_CHECKING:
    from xdist.remote import Producer

FOLDERS = ("tests/serve/", "tests/rdma/", "tests/models/")
"""One unit each. They begin first, because they take longest."""
NEXT = ("tests/native/",)
"""Folders whose files begin after these. All others, most of which take seconds, fill the end of the run."""
END_SECONDS = 60
"""For an interrupted worker: it ends servers, each of which may take 20 s to end its children."""


def unit_of(nodeid: str) -> str:
    """The unit to which a test belongs."""
    return next((folder for folder in FOLDERS if nodeid.startswith(folder)), nodeid.partition("::")[0])


def rank_of(nodeid: str) -> int:
    """Sorts tests by the time at which they are to begin."""
    order = (*FOLDERS, *NEXT)
    return next((rank for rank, folder in enumerate(order) if nodeid.startswith(folder)), len(order))


class Distribution(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Gives each worker whole units, in the order in which `rank_of` has sorted the tests.

    The mark `xdist_group` would do the same, but pytest 9.2 ignores how pytest-xdist 3.8 attaches it to a test.
    """

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        config.option.loadscopereorder = False  # by the number of tests in a unit, which says nothing here
        NodeManager.EXIT_TIMEOUT = END_SECONDS  # seconds until it is killed; pytest-xdist has no option for it
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)
