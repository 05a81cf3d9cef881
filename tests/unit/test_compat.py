"""Versions of vLLM: what counts as tested, and when two machines run the same source."""

from __future__ import annotations

import pytest

from vllm_spark.compat.versions import accepted_arguments, is_tested, source_version


@pytest.mark.parametrize("version", ["0.26.0", "0.27.1+nv25.12", "0.32.0+cpu", "0.33.1rc1.dev12+gabc1234.cu130"])
def test_tested_versions(version: str) -> None:
    assert is_tested(version)


@pytest.mark.parametrize(
    "version",
    ["0.25.1", "0.26.0rc2", "0.34.0rc1.dev3+g1234567", "0.1.dev1+g1234567", "1.0", "0.10.1.1+381074ae.nv25.09", "main"],
)
def test_versions_that_nobody_has_tried(version: str) -> None:
    assert not is_tested(version)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("0.33.0", "0.33.0+cu130"),
        ("0.33.0+cpu", "0.33.0+cu129"),
        ("0.33.1rc1.dev12+gabc1234.cu130", "0.33.1rc1.dev12+gabc1234"),
        ("0.33.1.dev3+gabc1234.d20261101", "0.33.1.dev3+gabc1234.cu130"),
    ],
)
def test_builds_of_one_source_pair(one: str, other: str) -> None:
    assert source_version(one) == source_version(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("0.33.0", "0.33.1"),
        ("0.1.dev1+g1234567", "0.1.dev1+g7654321"),
        ("0.27.1+nv25.12", "0.27.1"),
        ("0.33.1rc1.dev12+gabc1234.cu130", "0.33.1rc1.dev12+gdef5678.cu130"),
    ],
)
def test_builds_of_two_sources_do_not_pair(one: str, other: str) -> None:
    assert source_version(one) != source_version(other)


def test_arguments_that_a_version_does_not_know_are_left_out() -> None:
    def older(a: int, *, b: int = 0) -> None: ...

    assert accepted_arguments(older, {"a": 1, "b": 2, "newer": 3}) == {"a": 1, "b": 2}
