"""Finds the patches of vLLM, checks them against the installed source, and applies them.

Each patch is a file in the folder `patches/`, with the symbol, the reason why vLLM has no hook for it, and the known
fingerprints of the source. An unknown fingerprint disables an optional feature with a warning; if a required patch has
one, `--spark` does not start (`vllm_spark.compat.check`). A vLLM without `--spark` works in either case.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import logging
import pkgutil
import textwrap
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, Literal

from vllm_spark.compat.after_import import after_import
from vllm_spark.variables import internal_name

logger = logging.getLogger("vllm_spark")

_MARK = "_vllm_spark_patch"

ANNOUNCED = internal_name("engine_status")
"""A variable that is set in every process of a server with `--spark`."""


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A function, method or class of vLLM on which this project relies.

    `symbol` is `module:qualified.name`. With `scope="signature"` only its name and parameters are compared (enough for
    a wrapper), with `"source"` its whole text.
    """

    symbol: str
    scope: Literal["signature", "source"] = "signature"

    @property
    def module(self) -> str:
        """The module's dotted name."""
        return self.symbol.partition(":")[0]

    @property
    def qualified_name(self) -> str:
        """The name within the module."""
        return self.symbol.partition(":")[2]

    def fingerprint(self, source: str) -> str | None:
        """Twelve hexadecimal digits over the anchor's text in `source`; None if there is no such symbol.

        Indentation, blank lines and line breaks do not count.
        """
        return _fingerprint(self, source)


@functools.lru_cache(maxsize=512)  # each patch is checked several times in a process, and parsing takes milliseconds
def _fingerprint(anchor: Anchor, source: str) -> str | None:
    text = _text_of(source, anchor.qualified_name, anchor.scope)
    if text is None:
        return None
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:12]


When = Literal["start", "engine", "leading", "serving", "tuning"]


@dataclasses.dataclass(frozen=True)
class Patch:
    """One change to vLLM.

    Attributes:
        name: short name, for messages.
        anchor: the function or method that is replaced.
        reason: why vLLM has no hook for it.
        feature: what is unavailable while the patch is disabled.
        fingerprints: known fingerprints of the anchor, each with the vLLM versions that have it.
        replace: takes the original callable and returns the replacement.
        when: `start`: in every process of vLLM, when it has imported the module. Without `--spark` such a replacement
            calls the original with the same arguments, so it is applied without reading the source, which would slow
            down plain vLLM. `engine`: in a process that creates an engine of a pair. `leading`: in the process that
            serves clients of a pair. `serving`: in the processes that run a model for a pair, before they load it.
            `tuning`: in those that use tuned parameters, if tables require it.
        required: whether `--spark` needs it.
    """

    name: str
    anchor: Anchor
    reason: str
    feature: str
    fingerprints: Mapping[str, str]
    replace: Callable[[Callable[..., Any]], Callable[..., Any]]
    when: When = "start"
    required: bool = False


_PATCHES = "vllm_spark.patches"

State = Literal["applied", "ready", "unknown source", "symbol missing", "vLLM missing"]


@functools.cache
def all_patches() -> tuple[Patch, ...]:
    """The patches in the folder `patches/`, sorted by file name."""
    modules = pkgutil.iter_modules(importlib.import_module(_PATCHES).__path__)
    return tuple(
        importlib.import_module(f"{_PATCHES}.{name}").PATCH for name in sorted(module.name for module in modules)
    )


def state_of(patch: Patch) -> State:
    """Whether `patch` fits the installed vLLM, and whether it is applied in this process."""
    source = installed_source(patch.anchor.module)
    if source is None:
        return "vLLM missing"
    fingerprint = patch.anchor.fingerprint(source)
    if fingerprint is None:
        return "symbol missing"
    if fingerprint not in patch.fingerprints:
        return "unknown source"
    return "applied" if patch.name in _applied else "ready"


def watch_imports() -> None:
    """Applies each `start` patch once vLLM has imported its module. May be called again."""
    for patch in all_patches():
        if patch.when == "start" and patch.name not in _watched:
            _watched.add(patch.name)
            after_import(patch.anchor.module, functools.partial(_apply_if_present, patch))


def apply_all(when: When, names: Container[str] | None = None) -> None:
    """Applies the patches of that time that fit the installed vLLM; warns of the others. May be called again.

    Args:
        when: as in `Patch`.
        names: of those that are applied; None for all.
    """
    for patch in all_patches():
        if patch.when != when or patch.name in _applied or (names is not None and patch.name not in names):
            continue
        state = state_of(patch)
        if state == "ready":
            _apply(patch)
        else:
            logger.warning(
                "vllm_spark cannot provide %s: it does not support %s of %s in this vLLM (%s).",
                patch.feature,
                patch.anchor.qualified_name,
                patch.anchor.module,
                state,
            )


def remove(name: str) -> None:
    """Restores vLLM's own function, if the patch is applied and nothing else has replaced the function since."""
    replaced = _replaced.get(name)
    if replaced is None or name not in _applied:
        return
    if vars(replaced.owner).get(replaced.name) is replaced.replacement:
        setattr(replaced.owner, replaced.name, replaced.original)
        _applied.discard(name)
        del _replaced[name]


@functools.cache
def installed_source(module: str) -> str | None:
    """The source text of an installed module, without importing it; None if it does not exist."""
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    for root in spec.submodule_search_locations:
        base = Path(root, *rest.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path.read_text(encoding="utf-8")
    return None


@dataclasses.dataclass(frozen=True)
class _Replaced:
    """What a patch has replaced: an attribute of a module or class."""

    owner: Any
    name: str
    original: Any
    replacement: Any


_applied: set[str] = set()
_replaced: dict[str, _Replaced] = {}
_watched: set[str] = set()


def _apply_if_present(patch: Patch, module: Any) -> None:
    """Applies a `start` patch; only warns if the symbol is missing: `check_vllm` reports it for `--spark`."""
    try:
        _apply(patch)
    except (AttributeError, KeyError):
        logger.warning(
            "vllm_spark does not support this vLLM, which has no %s in %s: --spark cannot be used with it.",
            patch.anchor.qualified_name,
            module.__name__,
        )


def _apply(patch: Patch) -> None:
    owner: Any = importlib.import_module(patch.anchor.module)
    *path, name = patch.anchor.qualified_name.split(".")
    for step in path:
        owner = getattr(owner, step)
    # From the class's dictionary: attribute access would hide whether it is static, a class method or plain.
    original = vars(owner)[name]
    if isinstance(original, (staticmethod, classmethod)):
        kind = type(original)
        if hasattr(original.__func__, _MARK):
            return
        replacement: Any = kind(_marked(patch, original.__func__))
    else:
        if hasattr(original, _MARK):
            return
        replacement = _marked(patch, original)
    setattr(owner, name, replacement)
    _replaced[patch.name] = _Replaced(owner, name, original, replacement)
    _applied.add(patch.name)


def _marked(patch: Patch, original: Callable[..., Any]) -> Callable[..., Any]:
    replacement = functools.wraps(original)(patch.replace(original))
    setattr(replacement, _MARK, patch.name)
    return replacement


_parsed = functools.lru_cache(maxsize=1)(ast.parse)  # several anchors of one module follow each other


def _text_of(source: str, qualified_name: str, scope: str) -> str | None:
    node: ast.AST = _parsed(source)
    for name in qualified_name.split("."):
        found = next((child for child in _definitions(node) if child.name == name), None)
        if found is None:
            return None
        node = found
    lines = source.splitlines()
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    decorators = [decorator.lineno for decorator in node.decorator_list]
    first = min([node.lineno, *decorators])
    last = node.end_lineno if scope == "source" else max(node.body[0].lineno - 1, node.lineno)
    return textwrap.dedent("\n".join(lines[first - 1 : last]))


def _definitions(node: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, kinds)]
