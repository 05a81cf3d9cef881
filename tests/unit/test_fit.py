"""Whether `--spark` works with a vLLM: by its sources, of which edited copies lie on the path here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

import vllm_spark
from vllm_spark.compat.hooks import HOOKS
from vllm_spark.compat.patching import all_patches

pytest.importorskip("vllm", reason="vLLM is not installed")

CHECK = """
import logging, sys
sys.path[:0] = sys.argv[1:]
logging.basicConfig(format="%(levelname)s %(message)s")
from vllm_spark.errors import ConfigurationError
from vllm_spark.compat.check import check_vllm
try:
    check_vllm()
    print("works")
except ConfigurationError as error:
    print(error)
assert "vllm" not in sys.modules
"""
CREATE = "    def create_engine_config(\n        self,\n"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the installed vLLM that `--spark` looks at, and no metadata."""
    folder = tmp_path_factory.mktemp("sources")
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).parent
    anchors = [patch.anchor for patch in all_patches()] + [hook.anchor for hook in HOOKS]
    for module in {"vllm", *(anchor.module for anchor in anchors)}:
        parts = Path(*module.split(".")[1:])
        file = installed / parts.with_suffix(".py") if parts.name else installed / "__init__.py"
        if not file.is_file():
            file = installed / parts / "__init__.py"
        target = folder / "vllm" / file.relative_to(installed)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return folder


def verdict(folder: Path, version: str | None, distribution: str = "vllm") -> tuple[str, str]:
    """What the check says, and what it logs, where the vLLM in `folder` is the only one."""
    if version is not None:
        information = folder / f"{distribution.replace('-', '_')}-0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    elsewhere = [str(Path(vllm_spark.__file__).parents[1]), str(metadata.distribution("packaging").locate_file(""))]
    code = CHECK
    argv = [sys.executable, "-I", "-c", code, str(folder), *elsewhere]
    if version is None:
        # Without what is installed, and so without the vLLM that is; packaging is linked in.
        import packaging

        (folder / "packaging").symlink_to(Path(packaging.__file__).parent)
        import pydantic

        argv = [sys.executable, "-I", "-S", "-c", code, str(folder), elsewhere[0]]
        del pydantic
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip(), done.stderr.strip()


@pytest.fixture
def copy(sources: Path, tmp_path: Path) -> Path:
    """A vLLM to edit."""
    return Path(shutil.copytree(sources, tmp_path / "copy"))


def edit(copy: Path, file: str, old: str, new: str) -> None:
    path = copy / "vllm" / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_no_vllm(tmp_path: Path) -> None:
    assert verdict(tmp_path, None)[0].startswith("vLLM is not installed; install vLLM 0.26 to 0.33")


@pytest.mark.parametrize(
    "version",
    [
        "0.34.0rc1.dev3+g1234567",
        "0.1.dev1+g1234567",
        "0.26.0rc2",
        "0.10.1.1+381074ae.nv25.09",
        "main of yesterday",
    ],
)
def test_a_version_of_any_form_is_accepted_where_the_sources_fit(copy: Path, version: str) -> None:
    said, logged = verdict(copy, version)
    assert said == "works"
    assert f"vLLM {version} is installed, and has everything that it needs" in logged


@pytest.mark.parametrize("version", ["0.33.1rc1.dev12+gabc1234.cu130", "0.27.1+nv25.12", "0.33.1", "0.32.0+cpu"])
def test_a_tested_version_needs_no_word(copy: Path, version: str) -> None:
    assert verdict(copy, version) == ("works", "")


@pytest.mark.parametrize("version", ["0.32.0", "0.34.0"])
def test_another_signature_of_what_a_required_patch_changes(copy: Path, version: str) -> None:
    edit(copy, "engine/arg_utils.py", CREATE, CREATE + "        of_tomorrow: bool = False,\n")
    said, _ = verdict(copy, version)
    assert said.startswith(
        f"--spark does not work with vLLM {version}: vllm.engine.arg_utils:EngineArgs.create_engine_config has changed"
    )
    assert "; install a vLLM of 0.26 to 0.33, or a version of vllm-spark that supports this one" in said


def test_what_a_required_patch_changes_is_gone(copy: Path) -> None:
    edit(copy, "entrypoints/cli/serve.py", "class ServeSubcommand", "class AnotherSubcommand")
    assert "vllm.entrypoints.cli.serve:ServeSubcommand.cmd does not exist; install" in verdict(copy, "0.32.0")[0]


def test_another_signature_of_what_the_executor_overrides(copy: Path) -> None:
    edit(copy, "v1/executor/uniproc_executor.py", "    def collective_rpc(", "    def collective_rpc(of_tomorrow, ")
    assert "uniproc_executor:UniProcExecutor.collective_rpc has changed" in verdict(copy, "0.32.0")[0]


def test_another_body_of_what_the_executor_relies_on_is_named(copy: Path) -> None:
    edit(copy, "v1/engine/core.py", "if model_output is None:", "if not model_output:")
    said, logged = verdict(copy, "0.34.0")
    assert said == "works"
    assert "its source differs in vllm.v1.engine.core:EngineCore.step." in logged
