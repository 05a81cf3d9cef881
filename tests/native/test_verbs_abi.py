"""That libibverbs' binary interface is as csrc/transport/verbs/abi.hpp describes it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HEADER = Path("/usr/include/infiniband/verbs.h")


def test_the_description_agrees_with_libibverbs_header() -> None:
    if not HEADER.exists() or shutil.which("g++") is None:
        pytest.skip("needs libibverbs' headers (Debian package libibverbs-dev) and g++")
    source = Path(__file__).with_name("verbs_abi.cpp")
    done = subprocess.run(
        ["g++", "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", str(source)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
