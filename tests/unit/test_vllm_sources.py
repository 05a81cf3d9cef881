"""Every patch and hook against the sources of vLLM releases: fails when a fingerprint moves."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from vllm_spark.hooks import HOOKS
from vllm_spark.patches import Anchor, all_patches

ROOT = Path(__file__).parents[2]
RELEASES = ("0.26.0", "0.32.0", "0.33.0")
ANCHORS: list[tuple[Anchor, dict[str, str]]] = [
    *((patch.anchor, dict(patch.fingerprints)) for patch in all_patches()),
    *((hook.anchor, dict(hook.fingerprints)) for hook in HOOKS),
]


@pytest.fixture(scope="module", params=RELEASES)
def sources(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A release and the folder of its sources: from VLLM_SOURCES, or fetched once through pip."""
    given = os.environ.get("VLLM_SOURCES")
    if given:
        return request.param, Path(given) / f"vllm-{request.param}"
    tool = _tool()
    try:
        return request.param, tool.fetch(request.param, ROOT / "build" / "vllm-sources")
    except tool.FetchError as error:
        pytest.skip(
            f"the sources of vLLM {request.param} cannot be had: {error}; set VLLM_SOURCES to a folder with them"
        )


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("anchor", "known"), ANCHORS, ids=[anchor.symbol.partition(":")[2] for anchor, _ in ANCHORS])
def test_fingerprints_are_known(sources: tuple[str, Path], anchor: Anchor, known: dict[str, str]) -> None:
    release, folder = sources
    path = folder / (anchor.module.replace(".", "/") + ".py")
    fingerprint = anchor.fingerprint(path.read_text(encoding="utf-8"))
    assert fingerprint is not None, f"{anchor.symbol} is gone in vLLM {release}"
    assert fingerprint in known, f"{anchor.symbol} has moved in vLLM {release}: read it, then add {fingerprint}"
    assert release in known[fingerprint], f"{fingerprint} is listed for {known[fingerprint]}, not for {release}"


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_vllm_sources", ROOT / "tools" / "fetch_vllm_sources.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
