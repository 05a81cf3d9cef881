"""The tiny models and reports of tests/serve, for the models here, and two hosts of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.conftest import (
    logs,
    pytest_runtest_makereport,
    pytest_runtest_teardown,
    pytest_sessionfinish,
    tiny_moe,
)
from tests.serve.hosts import Host, Hosts, two_hosts

__all__ = ["logs", "pytest_runtest_makereport", "pytest_runtest_teardown", "pytest_sessionfinish", "tiny_moe"]


@pytest.fixture(scope="package")
def hosts(logs: Path) -> Iterator[Hosts]:
    """Two hosts, gone after this folder's tests: their names are those that the hosts of tests/serve need."""
    with two_hosts(logs) as (pair, _), pair[0].fork_server(), pair[1].fork_server():
        yield pair


@pytest.fixture(scope="package")
def host(hosts: Hosts) -> Host:
    """The first host, where one is enough."""
    return hosts[0]
