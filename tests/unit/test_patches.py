"""Patches: complete, idempotent, and off with a sentence where vLLM is not as they know it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_spark.compat import patching
from vllm_spark.compat.hooks import HOOKS
from vllm_spark.compat.patching import Anchor, Patch, When, all_patches, state_of

SOURCE = '''
class Engine:
    """Documentation."""

    @staticmethod
    def plain(a, b=1):
        # why
        return a + b

    @classmethod
    def made(cls,
             name: str) -> "Engine":
        return cls()

    def method(self): return 1
'''


def test_every_patch_and_hook_is_complete() -> None:
    found = all_patches()
    assert len({patch.name for patch in found}) == len(found) >= 4
    for patch in found:
        assert patch.reason
        assert patch.feature
        assert patch.fingerprints
    assert len({hook.anchor for hook in HOOKS}) == len(HOOKS)
    assert all(hook.used_for and hook.fingerprints for hook in HOOKS)


def test_a_fingerprint_ignores_layout_and_sees_everything_else() -> None:
    anchor, signature = Anchor("m:Engine.plain", "source"), Anchor("m:Engine.plain")
    original = anchor.fingerprint(SOURCE)
    assert original is not None
    assert anchor.fingerprint(SOURCE.replace("return a + b", "return   a  +  b")) == original
    assert anchor.fingerprint(SOURCE.replace("a + b", "a - b")) != original
    assert signature.fingerprint(SOURCE.replace("a + b", "a - b")) == signature.fingerprint(SOURCE)
    assert signature.fingerprint(SOURCE.replace("b=1", "b=2")) != signature.fingerprint(SOURCE)
    assert signature.fingerprint(SOURCE.replace("@staticmethod\n    def plain", "def plain")) != signature.fingerprint(
        SOURCE
    )
    made = Anchor("m:Engine.made")
    assert made.fingerprint(SOURCE.replace("cls,\n             name", "cls, name")) == made.fingerprint(SOURCE)
    assert Anchor("m:Engine.absent").fingerprint(SOURCE) is None


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A real package on the import path, with the module above."""
    name = "package_" + tmp_path.name.replace("-", "_")
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "engine.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def patch_for(package: str, method: str, fingerprints: dict[str, str] | None = None, when: When = "serving") -> Patch:
    anchor = Anchor(f"{package}.engine:Engine.{method}")
    known = fingerprints or {anchor.fingerprint(SOURCE) or "": "1.0"}

    def replace(old: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: ("new", old(*args, **kwargs))

    return Patch(f"{package}-{method}", anchor, "reason", "the feature", known, replace, when)


def test_patches_apply_once_and_keep_the_kind_of_method(fake_package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [patch_for(fake_package, method) for method in ("plain", "made", "method")]
    monkeypatch.setattr(patching, "all_patches", lambda: made)
    assert [state_of(patch) for patch in made] == ["ready"] * 3
    patching.apply_all("serving")
    patching.apply_all("serving")
    engine = __import__(f"{fake_package}.engine", fromlist=["Engine"]).Engine
    assert engine.plain(1, b=2) == ("new", 3)
    assert engine().plain(1) == ("new", 2)
    assert engine.made("x")[0] == "new"
    assert isinstance(engine.made("x")[1], engine)
    assert engine().method() == ("new", 1)
    assert [state_of(patch) for patch in made] == ["applied"] * 3


def test_an_unknown_source_disables_that_feature_alone(
    fake_package: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unknown, known = patch_for(fake_package, "plain", {"000000000000": "1.0"}), patch_for(fake_package, "method")
    gone = Patch("gone", Anchor(f"{fake_package}.engine:Engine.gone"), "r", "f", {"x": "1"}, lambda old: old, "serving")
    absent = Patch(
        "absent", Anchor("no_such_package.engine:Engine.gone"), "r", "f", {"x": "1"}, lambda old: old, "serving"
    )
    monkeypatch.setattr(patching, "all_patches", lambda: [unknown, gone, absent, known])
    with caplog.at_level(logging.WARNING):
        patching.apply_all("serving")
    engine = __import__(f"{fake_package}.engine", fromlist=["Engine"]).Engine
    assert engine.plain(1) == 2
    assert engine().method() == ("new", 1)
    assert "cannot provide the feature: it does not support Engine.plain of" in caplog.text
    assert [state_of(patch) for patch in (unknown, gone, absent)] == [
        "unknown source",
        "symbol missing",
        "vLLM missing",
    ]


def test_patches_of_the_start_wait_for_their_module(
    fake_package: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are made without reading the source, and missing symbols are logged."""
    unknown = patch_for(fake_package, "plain", {"000000000000": "1.0"}, "start")
    gone = Patch("not-there", Anchor(f"{fake_package}.engine:Engine.gone"), "r", "f", {"x": "1"}, lambda old: old)
    monkeypatch.setattr(patching, "all_patches", lambda: [unknown, gone, patch_for(fake_package, "method")])
    patching.watch_imports()
    patching.watch_imports()
    assert f"{fake_package}.engine" not in sys.modules
    engine = __import__(f"{fake_package}.engine", fromlist=["Engine"]).Engine
    assert engine.plain(1) == ("new", 2)
    assert engine().method() == 1
    assert "which has no Engine.gone in" in caplog.text


PLUGIN = """
import json, sys
import vllm.engine.arg_utils
if sys.argv[1] == "serve":
    import vllm.entrypoints.cli.serve
before = set(sys.modules)
from vllm_spark.entrypoints.plugin import register
register()
if sys.argv[1] == "serve":
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    parser = vllm.engine.arg_utils.AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.parse_args([])
print("\\n" + json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.mark.parametrize("process", ["engine", "serve"])
def test_a_process_without_the_flag_loads_a_few_modules_of_this_package_alone(process: str) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    argv = [sys.executable, "-c", PLUGIN, process]
    environment = os.environ | {"VLLM_PLUGINS": "spark"}  # without vLLM's own plugins
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True, env=environment)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "vllm_spark.compat.patching" in loaded
    assert [name for name in loaded if name.partition(".")[0] != "vllm_spark"] == []
    assert len([name for name in loaded if not name.startswith("vllm_spark.patches.")]) <= 13
    assert "vllm_spark.entrypoints.serve" not in loaded


def test_the_plugin_never_raises(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from vllm_spark.entrypoints.plugin import register

    def broken() -> list[Patch]:
        raise RuntimeError("a patch file is broken")

    monkeypatch.setattr(patching, "all_patches", broken)
    register()
    assert "vLLM continues without it" in caplog.text
