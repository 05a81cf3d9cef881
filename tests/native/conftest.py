"""What was compiled is kept for all native tests of a session."""

from __future__ import annotations

import pytest

from .programs import Programs, need


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Skips the test where there is no g++."""
    need("g++", "g++")
    return Programs(tmp_path_factory.mktemp("programs"))
