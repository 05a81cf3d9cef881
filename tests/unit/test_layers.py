"""Imports point downwards: no module knows one of a layer above its own, and no two need each other."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "vllm_spark"
ROOT = Path(__file__).parents[2]
LINKED = ("patches", "configs")
"""Subpackages that lie at the top of the tree; their place in the package is a link, which `rglob` does not follow."""
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in (PACKAGE, *(f"{PACKAGE}/{name}" for name in LINKED))
    for path in (ROOT / folder).rglob("*.py")
}
NATIVE = f"{PACKAGE}._native"


def layers() -> list[list[str]]:
    """The layers of docs/contributing.md, highest first as there, each with the modules and packages in it."""
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    section = text.partition("## Layers\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!layer|---)[^|]+ \| ([^|]+) \|$", section, re.MULTILINE)
    return [[f"{PACKAGE}.{name}" for name in re.findall(r"`([a-z_.]+)`", row)] for row in rows]


LAYERS = layers()


class Import(NamedTuple):
    """One module's use of another."""

    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{MODULES[self.importer].relative_to(ROOT)}:{self.line} imports {self.imported}"


def imports_of(importer: str, path: Path) -> Iterator[Import]:
    """What a module imports of the package: at its top, in its functions, and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from package import name` may take a module of that name, or something out of the package itself.
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES or name == NATIVE else str(node.module) for name in members]
        else:
            continue
        for name in dict.fromkeys(names):
            if name.partition(".")[0] == PACKAGE and name != NATIVE:
                yield Import(importer, name, node.lineno)


IMPORTS = [each for name, path in MODULES.items() for each in imports_of(name, path)]


def height(module: str) -> int:
    """Of its layer, 0 for the lowest. A module belongs where the longest name stands that it begins with."""
    if module == PACKAGE:
        return 0  # holds the version, and imports nothing
    found = [
        (len(name), -index)
        for index, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert found, f"{module} belongs to no layer; say in docs/contributing.md to which"
    return len(LAYERS) - 1 + max(found)[1]


def test_layers_consist_of_what_there_is() -> None:
    names = [name for each in LAYERS for name in each]
    assert len(names) == len(set(names)) > len(LAYERS) > 5
    assert set(names) <= MODULES.keys()


def test_no_module_knows_one_of_a_higher_layer() -> None:
    upwards = [str(each) for each in IMPORTS if height(each.imported) > height(each.importer)]
    assert not upwards, "\n".join(["", *upwards])


def test_no_two_modules_need_each_other() -> None:
    needs: dict[str, set[str]] = {name: set() for name in MODULES}
    for each in IMPORTS:
        needs[each.importer].add(each.imported)
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail(" is needed by ".join(error.args[1]))


def test_no_two_packages_need_each_other() -> None:
    """Packages right below this one, taken whole."""
    needs: dict[str, set[str]] = {}
    for each in IMPORTS:
        importer, imported = (package(name) for name in (each.importer, each.imported))
        if importer != imported:
            needs.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail(" is needed by ".join(error.args[1]))


def package(module: str) -> str:
    """The package or module right below this one in which `module` is."""
    return ".".join(module.split(".")[:2])


def test_folders_are_small() -> None:
    """A reader looks through the names of a folder at a glance."""
    counts = Counter(path.parent.relative_to(ROOT) for path in MODULES.values())
    assert counts.pop(Path(PACKAGE)) <= 8
    changes = counts.pop(Path(PACKAGE, "patches"))  # a list, that grows by one change of vLLM a file
    assert changes < 40
    assert {str(folder): count for folder, count in counts.items() if count > 14} == {}
