"""What runs once a module has been imported."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vllm_spark.compat.after_import import after_import


@pytest.fixture
def module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "imported_" + tmp_path.name.replace("-", "_")
    (tmp_path / f"{name}.py").write_text("value = 1\ndef function():\n    return value\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_the_action_runs_once_after_the_module(module_name: str) -> None:
    seen: list[tuple[ModuleType, int]] = []
    after_import(module_name, lambda module: seen.append((module, module.value)))
    assert seen == []
    assert module_name not in sys.modules
    module = importlib.import_module(module_name)
    assert seen == [(module, 1)]
    importlib.reload(module)
    assert len(seen) == 1


def test_a_module_that_is_there_already(module_name: str) -> None:
    module = importlib.import_module(module_name)
    seen: list[ModuleType] = []
    after_import(module_name, seen.append)
    assert seen == [module]


def test_the_module_is_as_if_nobody_had_waited(module_name: str) -> None:
    after_import(module_name, lambda module: None)
    module = importlib.import_module(module_name)
    assert inspect.getsource(module.function) == "def function():\n    return value\n"
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__


def test_a_module_that_does_not_exist_is_still_not_found() -> None:
    after_import("vllm_spark_no_such_module", lambda module: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("vllm_spark_no_such_module")


def test_a_package_and_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "package_" + tmp_path.name.replace("-", "_")
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "part.py").write_text("value = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[str] = []
    for each in (f"{name}.part", name):
        after_import(each, lambda module: seen.append(module.__name__))
    importlib.import_module(f"{name}.part")
    assert seen == [name, f"{name}.part"]


def test_a_module_that_was_only_looked_for_or_failed_once(module_name: str, tmp_path: Path) -> None:
    seen: list[str] = []
    after_import(module_name, lambda module: seen.append(module.__name__))
    assert importlib.util.find_spec(module_name) is not None
    path = tmp_path / f"{module_name}.py"
    text = path.read_text()
    path.write_text("raise RuntimeError\n")
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError):
        importlib.import_module(module_name)
    path.write_text(text + "# of another size than before\n")
    importlib.import_module(module_name)
    assert seen == [module_name]
