"""What was compiled is kept for all native tests of a run."""

from __future__ import annotations

import pytest

from tests.workers import shared_folder

from .programs import Programs, need


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Skips the test where there is no g++."""
    need("g++", "g++")
    folder = shared_folder(tmp_path_factory) / "programs"
    folder.mkdir(exist_ok=True)
    return Programs(folder)
