"""The project's data: from the installed package or its checkout, and never from a stranger's folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = """
from vllm_spark.errors import SparkError
from vllm_spark.patches import all_patches
try:
    print(sorted(patch.name for patch in all_patches()))
except SparkError as error:
    print(error)
"""


@pytest.fixture
def site_packages(tmp_path: Path) -> Path:
    """Where the package lies as a broken build would install it, without its data, beside a stranger's `patches`."""
    shutil.copytree(ROOT / "vllm_spark", tmp_path / "vllm_spark", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "theirs.py").write_text("print('executed')")
    return tmp_path


def names(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", NAMES], cwd=folder, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": "."}
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("project", [None, "", '[project]\nname = "another"\n'])
def test_a_strangers_folder_is_not_executed(site_packages: Path, project: str | None) -> None:
    if project is not None:
        (site_packages / "pyproject.toml").write_text(project)
    said = names(site_packages)
    assert "executed" not in said
    assert (
        f"incomplete: there is no folder {site_packages / 'vllm_spark' / 'data' / 'patches'}; install it again" in said
    )


def test_a_checkout_and_an_installed_package_have_theirs(site_packages: Path) -> None:
    expected = names(ROOT)
    assert "serve-command" in expected
    shutil.copytree(ROOT / "patches", site_packages / "vllm_spark" / "data" / "patches")
    assert names(site_packages) == expected
