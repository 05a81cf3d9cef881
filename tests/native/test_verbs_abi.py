"""That libibverbs' binary interface is as csrc/transport/verbs/abi.hpp describes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from .programs import HERE, compile_with, need

HEADER = Path("/usr/include/infiniband/verbs.h")


def test_the_description_agrees_with_libibverbs_header() -> None:
    need("g++", "g++")
    if not HEADER.exists():
        pytest.skip("needs libibverbs' headers (Debian package libibverbs-dev)")
    compile_with("g++", "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", HERE / "verbs_abi.cpp")
