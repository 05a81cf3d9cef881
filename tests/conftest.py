"""Leaves out the thorough tests where they were not asked for."""

from __future__ import annotations

import pytest

from .thorough import THOROUGH


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if THOROUGH:
        return
    for item in items:
        if item.get_closest_marker("thorough") is not None:
            item.add_marker(pytest.mark.skip(reason="thorough; run it with VLLMSPARK_THOROUGH=1"))
