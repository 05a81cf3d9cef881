"""What is known of vLLM's FusedMoE kernels holds for every supported release, read from its sources."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.test_vllm_sources import RELEASES, sources  # noqa: F401  (a fixture)
from vllm_spark.kernels.fused_moe.compile import CompileError, compile_row
from vllm_spark.kernels.fused_moe.shapes import default_row
from vllm_spark.kernels.fused_moe.table import FusedMoeShape

FILE = Path("vllm", "model_executor", "layers", "fused_moe", "fused_moe.py")
ROW = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3}
SHAPES = (
    FusedMoeShape(128, 384),
    FusedMoeShape(128, 384, "fp8_w8a8"),
    FusedMoeShape(128, 384, "fp8_w8a8", (128, 128)),
    FusedMoeShape(128, 384, "int4_w4a16"),
    FusedMoeShape(128, 384, "int8_w8a16"),
)


@pytest.fixture
def kernels(sources: tuple[str, Path]) -> Path:  # noqa: F811
    path = sources[1] / FILE
    assert path.is_file()
    return path


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "sources",
    [release if release == "0.32.0" else pytest.param(release, marks=pytest.mark.thorough) for release in RELEASES],
    indirect=True,
)
def test_kernels_of_every_release_compile_for_sm_121(kernels: Path) -> None:
    shared = {}
    for shape in SHAPES:
        compiled = compile_row(shape, ROW, (12, 1), kernels)
        assert compiled.spilled_bytes == 0, shape
        shared[shape.dtype, shape.block_shape] = compiled.shared_bytes
    assert shared[None, None] == 2 * (16 + 64) * 128 * 2
    assert shared["fp8_w8a8", None] == 2 * (16 + 64) * 128


@pytest.mark.timeout(900)
def test_defaults_of_every_release_are_the_same(kernels: Path) -> None:
    theirs = default_of(kernels)
    for shape in (*SHAPES[:3], FusedMoeShape(512, 256), FusedMoeShape(512, 256, "fp8_w8a8", (64, 64))):
        block = list(shape.block_shape) if shape.block_shape else None
        for tokens in (*range(1, 600), 129 * shape.experts - 1, 129 * shape.experts):
            expected = theirs(tokens, shape.experts, shape.size_n, 2048, 8, shape.dtype, block)
            assert default_row(shape, tokens) == expected, (shape, tokens)


def test_kernels_that_are_not_known(tmp_path: Path) -> None:
    other = tmp_path / "fused_moe.py"
    other.write_text("def something_else():\n    pass\n")
    with pytest.raises(CompileError, match="this version of vLLM is not supported"):
        compile_row(SHAPES[0], ROW, (12, 1), other)


def default_of(path: Path) -> Callable[..., Any]:
    """A release's own rule: its function alone, since the release is not installed."""
    (function,) = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "get_default_config"
    ]
    names: dict[str, Any] = {
        "envs": SimpleNamespace(VLLM_BATCH_INVARIANT=False),
        "current_platform": SimpleNamespace(is_rocm=lambda: False),
    }
    exec(compile(ast.Module([function], []), str(path), "exec"), names)
    rule: Callable[..., Any] = names["get_default_config"]
    return rule
