"""The patches for tuned parameters, on the installed vLLM: in force where a pair serves, and nowhere else."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_spark.compat import patching
from vllm_spark.compat.patching import Patch, all_patches
from vllm_spark.kernels import lookup, runtime
from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.fused_moe.table import FusedMoeShape, provenance_path

from .test_kernels_lookup import CHANGES, MOE, W13, Folders, call, folders, store_marlin, store_moe

__all__ = ["folders"]  # a fixture

TUNING = {"fused-moe-tables", "marlin-atomic-add", "marlin-parameters"}
SERVING = {"process-groups", "repeated-scales", "speculation-on-cpu"}


class Engine(SimpleNamespace):
    """The part of vLLM's configuration that tables change."""

    def __init__(self) -> None:
        super().__init__(additional_config={"mine": 1, "spark": {"version": "1"}})


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine that uses tables in this process, whose vLLM is not changed for it."""
    monkeypatch.setattr(runtime, "apply_all", lambda when, names: None)
    monkeypatch.setattr(runtime, "layers_with_atomic_add", lambda: frozenset({(512, 4096)}))
    for name in ("_active", "_widths_with_atomic_add"):
        monkeypatch.setattr(runtime, name, getattr(runtime, name))
    made = Engine()
    runtime.start(made)
    return made


def patch(name: str) -> Patch:
    return next(each for each in all_patches() if each.name == name)


def test_these_are_for_serving_and_those_for_tuned_parameters() -> None:
    assert {each.name for each in all_patches() if each.when == "serving"} == SERVING
    assert {each.name for each in all_patches() if each.when == "tuning"} == TUNING


def test_only_a_process_that_uses_tables_has_them() -> None:
    """What vLLM loads by itself applies others, and so does a rank of a pair; the look-up of tables is replaced once.

    There is no table for this device's layers, so Marlin's functions are vLLM's own.
    """
    look = """
import json
from vllm_spark.compat import patching as patches
from vllm_spark.entrypoints.plugin import register
register()
before = sorted(patches._applied)
import vllm_spark.kernels.runtime as serving
serving.start()
serving.start()
import vllm._custom_ops as ops
from vllm.model_executor.layers.fused_moe import fused_moe
marked = [getattr(f, "_vllm_spark_patch", None) for f in (ops.moe_wna16_marlin_gemm, fused_moe.get_moe_configs)]
print(json.dumps([before, sorted(patches._applied), marked]))
"""
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=300, check=True)
    before, after, marked = json.loads(done.stdout.splitlines()[-1])
    assert not TUNING.intersection(before)
    assert set(after) - set(before) == {"fused-moe-tables"}
    assert marked == [None, "fused-moe-tables"]


@pytest.fixture
def unpatched() -> Iterator[Any]:
    """vLLM's module with Marlin's operator; what was replaced in it is restored."""
    import vllm._custom_ops as ops

    original = ops.moe_wna16_marlin_gemm
    yield ops
    ops.moe_wna16_marlin_gemm = original
    patching._applied.discard("marlin-parameters")
    patching._replaced.pop("marlin-parameters", None)


def test_vllms_own_function_comes_back(unpatched: Any) -> None:
    original = unpatched.moe_wna16_marlin_gemm
    for _ in range(2):
        patching.remove("marlin-parameters")
        assert unpatched.moe_wna16_marlin_gemm is original
        patching.apply_all("tuning", {"marlin-parameters"})
        assert unpatched.moe_wna16_marlin_gemm is not original
        assert unpatched.moe_wna16_marlin_gemm.__wrapped__ is original
    assert TUNING & patching._applied == {"marlin-parameters"} | (patching._applied & {"fused-moe-tables"})
    patching.remove("marlin-parameters")
    assert unpatched.moe_wna16_marlin_gemm is original
    assert "marlin-parameters" not in patching._applied


def test_a_function_that_something_else_replaced_since_is_left_alone(unpatched: Any) -> None:
    patching.apply_all("tuning", {"marlin-parameters"})
    ours = unpatched.moe_wna16_marlin_gemm

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    unpatched.moe_wna16_marlin_gemm = theirs
    patching.remove("marlin-parameters")
    assert unpatched.moe_wna16_marlin_gemm is theirs
    assert "marlin-parameters" in patching._applied


def test_only_a_process_with_tuned_rows_replaces_marlins_operator(
    folders: Folders, unpatched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an engine whose layers are not known: a program that decodes with tables and without a pair."""
    original = unpatched.moe_wna16_marlin_gemm
    monkeypatch.setattr(runtime, "device_name", lambda: GB10.name)
    monkeypatch.setattr(runtime, "_active", None)
    marlin = {"marlin-parameters"}
    monkeypatch.setattr(runtime, "apply_all", lambda when, names: patching.apply_all(when, names & marlin))
    for tile, replaced in (({"thread_k": -1, "thread_n": -1, "blocks_per_sm": -1}, False), (CHANGES, True)):
        store_marlin(folders.user, W13, **tile)
        runtime.start()
        assert (unpatched.moe_wna16_marlin_gemm is not original) == replaced
        runtime.stop(runtime._WHOLE_PROCESS)
        assert unpatched.moe_wna16_marlin_gemm is original


def test_an_unknown_source_disables_one_of_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state_of = patching.state_of
    monkeypatch.setattr(
        patching, "state_of", lambda each: "unknown source" if each.name == "marlin-parameters" else state_of(each)
    )
    applied: list[str] = []
    monkeypatch.setattr(patching, "_applied", set())
    monkeypatch.setattr(patching, "_apply", lambda each: applied.append(each.name))
    patching.apply_all("tuning")
    assert set(applied) == TUNING - {"marlin-parameters"}
    assert "cannot provide tuned parameters of Marlin for experts" in caplog.text


def test_marlins_operator_is_called_with_the_tables_tile(
    folders: Folders, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator itself needs a GPU: this one has its parameters, in the installed vLLM, and notes its arguments."""
    import vllm._custom_ops as ops

    monkeypatch.setattr(runtime, "this_device", lambda: GB10)
    store_marlin(folders.user)
    signature = inspect.signature(ops.moe_wna16_marlin_gemm)

    def operator(*args: Any, **kwargs: Any) -> dict[str, Any]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    operator.__signature__ = signature  # type: ignore[attr-defined]
    patched = patch("marlin-parameters").replace(operator)
    args, kwargs = call(list(signature.parameters), W13, 1)
    unchanged = operator(*args, **kwargs)
    assert patched(*args, **kwargs) == unchanged | CHANGES
    assert patched(*args, **kwargs, thread_k=64, thread_n=128) == unchanged | {"thread_k": 64, "thread_n": 128}
    runtime.stop(engine)
    assert patched(*args, **kwargs) == unchanged, "of an engine without a pair"
    runtime.start(engine)
    args, kwargs = call(list(signature.parameters), W13, 9)
    assert patched(*args, **kwargs) == operator(*args, **kwargs)


def test_the_next_engine_reads_tables_anew(folders: Folders, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "this_device", lambda: GB10)
    monkeypatch.setattr(runtime, "device_name", lambda: GB10.name)
    names = list(inspect.signature(pytest.importorskip("vllm._custom_ops").moe_wna16_marlin_gemm).parameters)
    args, kwargs = call(names, W13, 1)

    def operator(*args: Any, **kwargs: Any) -> Any:
        return kwargs.get("thread_k")

    operator.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    patched = patch("marlin-parameters").replace(operator)

    def triton() -> Any:
        return runtime.choose_fused_moe_table(MOE.experts, MOE.size_n, MOE.dtype, 0, 0, lambda: None)

    assert (patched(*args, **kwargs), triton()) == (None, None)
    store_marlin(folders.user)
    store_moe(folders.user, 32)
    assert (patched(*args, **kwargs), triton()) == (None, None), "files are read once for an engine"
    runtime.stop(engine)
    runtime.start(engine)
    assert patched(*args, **kwargs) == CHANGES["thread_k"]
    assert triton()[1]["BLOCK_SIZE_N"] == 32


def test_without_tables_marlins_operator_is_only_called(
    folders: Folders, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_spark.kernels.marlin.tile_choice import MarlinCalls

    def fail(*given: Any) -> None:
        raise AssertionError("nothing is looked for in a call")

    monkeypatch.setattr(runtime, "this_device", lambda: GB10)
    monkeypatch.setattr(MarlinCalls, "overrides", fail)
    store_moe(folders.user, 64)
    patched = patch("marlin-parameters").replace(lambda *args, **kwargs: (args, kwargs))
    assert patched(1, size_m=2) == ((1,), {"size_m": 2})
    monkeypatch.setattr(runtime, "this_device", fail)
    assert patched(1, size_m=3) == ((1,), {"size_m": 3})


def test_vllm_finds_fused_moe_tables(
    folders: Folders, engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm.model_executor.layers.fused_moe import fused_moe

    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    monkeypatch.setattr(runtime, "device_name", lambda: GB10.name)
    monkeypatch.setattr(fused_moe, "get_device_name_as_file_name", lambda: GB10.name)
    original: Any = inspect.unwrap(fused_moe.get_moe_configs, stop=lambda f: hasattr(f, "cache_parameters"))
    get: Any = patch("fused-moe-tables").replace(original)
    assert get.cache_parameters() == original.cache_parameters()

    asked = (MOE.experts, MOE.size_n, MOE.dtype, 0, 0)
    assert get(*asked) is None
    store_moe(folders.user, 32)
    lookup.clear_cache()
    assert get(*asked) is None, "vLLM asks once"
    get.cache_clear()
    found = get(*asked)
    assert found[1]["BLOCK_SIZE_N"] == 32
    assert get(*asked) is found
    assert get.cache_info().hits == 1

    theirs = tmp_path / "theirs" / MOE.file_name(GB10.name)
    theirs.parent.mkdir()
    theirs.write_text(json.dumps({"triton_version": "3.8.0", "1": {"BLOCK_SIZE_N": 128}}))
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(theirs.parent))
    get.cache_clear()
    assert get(*asked) == {1: {"BLOCK_SIZE_N": 128}}

    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER")
    get.cache_clear()
    shape = FusedMoeShape(256, 512, "fp8_w8a8", (128, 128))
    if not (Path(fused_moe.__file__).parent / "configs" / shape.file_name(GB10.name)).is_file():
        pytest.skip("vLLM before 0.32 has no table for a GB10")
    shipped_by_vllm = get(256, 512, "fp8_w8a8", 128, 128)
    assert shipped_by_vllm
    assert shipped_by_vllm == original.__wrapped__(256, 512, "fp8_w8a8", 128, 128)
    assert get(E=256, N=512, dtype="fp8_w8a8", block_n=128, block_k=128) == shipped_by_vllm


def test_an_engine_after_the_pair_finds_vllms_tables(
    folders: Folders, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM remembers of the pair's is forgotten, and the other way round."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    monkeypatch.setattr(runtime, "device_name", lambda: GB10.name)
    monkeypatch.setattr(fused_moe, "get_device_name_as_file_name", lambda: GB10.name)
    original: Any = inspect.unwrap(fused_moe.get_moe_configs, stop=lambda f: hasattr(f, "cache_parameters"))
    get: Any = patch("fused-moe-tables").replace(original)
    monkeypatch.setattr(fused_moe, "get_moe_configs", get)
    store_moe(folders.user, 32)
    asked = (MOE.experts, MOE.size_n, MOE.dtype, 0, 0)
    assert get(*asked)[1]["BLOCK_SIZE_N"] == 32
    runtime.stop(Engine())
    assert get(*asked)[1]["BLOCK_SIZE_N"] == 32, "another engine than the one that uses them"
    runtime.stop(engine)
    assert get(*asked) is None
    runtime.start(engine)
    assert get(*asked)[1]["BLOCK_SIZE_N"] == 32


@pytest.mark.parametrize(("of_table", "taken"), [(128, True), (None, True), (64, False)])
def test_a_table_for_other_groups_is_left_out(
    folders: Folders,
    engine: Engine,
    of_table: int | None,
    taken: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    monkeypatch.setattr(runtime, "device_name", lambda: GB10.name)
    path = provenance_path(store_moe(folders.user, 32))
    noted = json.loads(path.read_text()) | ({} if of_table is None else {"group_size": of_table})
    path.write_text(json.dumps(noted))
    # vLLM has a block of no width and the group's height for weights of 4 bits.
    found = runtime.choose_fused_moe_table(MOE.experts, MOE.size_n, MOE.dtype, 0, 128, lambda: None)
    assert (found is not None) == taken
    assert ("is for groups of 64, not 128" in caplog.text) == (not taken)


def test_the_compile_cache_knows_what_tables_change_in_compiled_code(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With vLLM's own key, for another engine of the same process too."""
    from vllm.config import VllmConfig

    first = engine.additional_config
    assert (first["mine"], first["spark"]["version"]) == (1, "1")
    keys = set()
    before = {"spark": {"version": "1"}}
    for widths in ({(512, 4096)}, {(512, 4096), (512, 2048)}, set()):
        config = VllmConfig(additional_config=before)
        plain = config.compute_hash()
        monkeypatch.setattr(runtime, "layers_with_atomic_add", lambda widths=widths: frozenset(widths))
        runtime.start(config)
        assert (config.compute_hash() != plain) == bool(widths)
        keys.add(config.compute_hash())
    assert len(keys) == 3
    assert before == {"spark": {"version": "1"}}


def test_a_compiler_can_trace_the_choice_of_atomic_add(engine: Engine) -> None:
    """vLLM decides inside of what it compiles, with a number of rows that has no value."""
    import torch
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    choose = patch("marlin-atomic-add").replace(marlin_utils.should_use_atomic_add_reduce)

    def layer(x: torch.Tensor, width: int) -> torch.Tensor:
        return x + 1 if choose(x.shape[0], width, 4096, x.device, x.dtype) else x - 1

    compiled: Callable[..., torch.Tensor] = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for rows in (2, 3, 7):
        x = torch.zeros(rows, 1)
        assert compiled(x, 512).tolist() == [[1.0]] * rows
        assert compiled(x, 1024).tolist() == [[-1.0]] * rows


def test_without_a_pair_atomic_add_is_vllms_choice(engine: Engine) -> None:
    choose = patch("marlin-atomic-add").replace(lambda m, n, k, device, dtype: False)
    asked = (1, 512, 4096, None, None)
    assert choose(*asked)
    assert not choose(1, 512, 2048, None, None)
    runtime.stop(engine)
    assert not choose(*asked)
