"""Tests that import transformers leave the environment of the processes that they start as it was."""

from __future__ import annotations

import os

import pytest

from tests.models.environment import unchanged_environment


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANGED", "before")
    monkeypatch.setenv("DELETED", "before")
    before = dict(os.environ)
    with pytest.raises(KeyError):
        _change_it_and_fail()
    assert dict(os.environ) == before


@unchanged_environment()
def _change_it_and_fail() -> None:
    os.environ["ADDED"] = "1"
    os.environ["CHANGED"] = "after"
    del os.environ["DELETED"]
    raise KeyError
