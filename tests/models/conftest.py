"""The hosts, tiny models and reports of tests/serve, for the models here."""

from tests.serve.conftest import (
    host,
    hosts,
    logs,
    pytest_runtest_makereport,
    pytest_runtest_teardown,
    pytest_sessionfinish,
    tiny_moe,
)

__all__ = [
    "host",
    "hosts",
    "logs",
    "pytest_runtest_makereport",
    "pytest_runtest_teardown",
    "pytest_sessionfinish",
    "tiny_moe",
]
