"""A wheel is complete (native module, patches, tables) and works outside the source tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import vllm_spark._native

ROOT = Path(__file__).parents[2]

LOOK = """
import json, sys
import vllm_spark
from vllm_spark._native import REGION_VERSION
from vllm_spark.compat.patching import all_patches
print(json.dumps([vllm_spark.__file__, REGION_VERSION, sorted(patch.name for patch in all_patches())]))
"""


def copy_sources(target: Path) -> None:
    """Copies the files of this source tree."""
    copy = ["git", "-C", str(ROOT), "ls-files", "-z"]
    names = subprocess.run(copy, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists():
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place, follow_symlinks=False)


FROM_SOURCE = [pytest.param(way, marks=pytest.mark.thorough) for way in ("from source", "from an sdist")]


@pytest.fixture(scope="module", params=["built before", *FROM_SOURCE])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this source tree, made as pip makes it; the native module is the one here, or compiled anew."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    copy_sources(source)
    if request.param == "built before":
        place_what_is_built(source)
    if request.param == "from an sdist":
        source = make_sdist(source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (made,) = folder.glob("*.whl")
    return made


def make_sdist(source: Path) -> Path:
    """The archive of sources that would be uploaded."""
    backend = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    subprocess.run([sys.executable, "-c", backend], cwd=source, capture_output=True, timeout=120, check=True)
    (archive,) = (source / "dist").glob("*.tar.gz")
    return archive


def place_what_is_built(source: Path) -> None:
    """Puts the native module and the kernels where setuptools looks for what it has built already."""
    platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    folder = source / "build" / f"lib.{platform}" / "vllm_spark"
    folder.mkdir(parents=True)
    for built in (vllm_spark._native.__file__, ROOT / "vllm_spark" / "kernels.fatbin"):
        if Path(built).exists():
            shutil.copy(built, folder)  # newer than all sources


def test_a_wheel_has_everything(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in ("patches", "configs"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"vllm_spark/{path.relative_to(ROOT)}" in names
    assert any(name.startswith("vllm_spark/_native.") and name.endswith(".so") for name in names)
    assert ("vllm_spark/kernels.fatbin" in names) == (shutil.which("nvcc") is not None)
    assert {"vllm_spark/py.typed", "vllm_spark/_native.pyi"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/"))]


def test_a_wheel_works_outside_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    where, version, patches = json.loads(done.stdout)
    assert Path(where).parent == tmp_path / "vllm_spark"
    assert version >= 2
    assert patches == sorted(path.stem.replace("_", "-") for path in (ROOT / "patches").glob("[a-z]*.py"))


def test_uninstalling_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=120)

    def files() -> set[Path]:
        return {path for path in environment.rglob("*") if "__pycache__" not in path.parts}

    def pip(*arguments: str) -> None:
        command = [str(environment / "bin" / "python"), "-m", "pip", "--quiet", *arguments]
        subprocess.run(command, check=True, timeout=120, capture_output=True)

    before = files()
    pip("install", "--no-deps", str(wheel))
    assert (environment / "bin" / "vllm-spark") in files() - before
    pip("uninstall", "--yes", "vllm-spark")
    assert files() == before


def test_a_program_beside_a_clone_finds_the_package(tmp_path: Path) -> None:
    """The clone is a folder vllm_spark without __init__.py, which Python takes for a namespace package."""
    clone, environment = tmp_path / "vllm_spark", tmp_path / "environment"
    copy_sources(clone)
    # Imports do not depend on the native module, and compiling all of it takes a minute.
    shutil.rmtree(clone / "csrc")
    (clone / "csrc" / "kernels").mkdir(parents=True)
    (clone / "csrc" / "kernels" / "collectives.cu").touch()
    (clone / "csrc" / "bindings.cpp").write_text("#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_native, m) {}\n")
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=120)
    python = str(environment / "bin" / "python")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", str(clone)]
    done = subprocess.run(pip, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    program = tmp_path / "prog.py"
    program.write_text("import vllm_spark, vllm_spark.patches\nprint(vllm_spark.__version__, vllm_spark.__file__)\n")
    done = subprocess.run(
        [python, str(program)], env=variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [vllm_spark.__version__, str(clone / "vllm_spark" / "__init__.py")]
