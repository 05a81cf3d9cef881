"""Which table serving takes: the user's own, then this project's, then vLLM's; and what it changes in a call."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_spark.kernels import lookup, runtime
from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.fused_moe import table as fused_moe_table
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, FusedMoeParameters, vllm_row
from vllm_spark.kernels.fused_moe.table import (
    FusedMoeProvenance,
    FusedMoeShape,
    FusedMoeTable,
    provenance_path,
    store_fused_moe_table,
)
from vllm_spark.kernels.marlin import table as marlin_table
from vllm_spark.kernels.marlin.table import MarlinParameters, MarlinRow, MarlinShape, MarlinTable, store_marlin_table
from vllm_spark.kernels.marlin.tile_choice import MarlinCalls
from vllm_spark.kernels.table import VLLM_DEFAULT, Provenance

from .folder_rights import no_entry

GUESS = Provenance(kind="derived", rule="a guess")
W13 = MarlinShape(kernel="moe_w13", experts=128, top_k=8, size_n=768, size_k=2048, group_size=128, quant_type="uint4b8")
W2 = W13.model_copy(update={"kernel": "moe_w2", "size_n": 2048, "size_k": 384})
TILE = {"thread_k": 128, "thread_n": 64, "blocks_per_sm": 2, "block_size_m": 8}
CHANGES = {"thread_k": 128, "thread_n": 64, "blocks_per_sm": 2}
MOE = FusedMoeShape(128, 384, "int4_w4a16")
LOCKS = 4 * GB10.multiprocessors


@dataclasses.dataclass
class Folders:
    """Where tables are looked for."""

    user: Path
    shipped: Path


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folders]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(lookup, "configs_folder", lambda: tmp_path / "configs")
    lookup.clear_cache()
    user = lookup.user_folder()
    assert user is not None
    yield Folders(user, lookup.shipped_folder())
    lookup.clear_cache()


def store_marlin(folder: Path, shape: MarlinShape = W13, **values: Any) -> Path:
    row = MarlinRow(**{**TILE, **values}, provenance=GUESS)
    table = MarlinTable(device=GB10.name, shape=shape, rows=dict.fromkeys((1, 4, 8), row))
    return store_marlin_table(table, folder / marlin_table.FOLDER)


def store_moe(folder: Path, block_size_n: int, rule: str = "a guess", shape: FusedMoeShape = MOE) -> Path:
    row = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": block_size_n, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1}
    provenance = FusedMoeProvenance(rows={1: Provenance(kind="derived", rule=rule)})
    return store_fused_moe_table(shape, GB10.name, FusedMoeTable({1: row}), provenance, folder / fused_moe_table.FOLDER)


def parameters(rows: int = 1, shape: MarlinShape = W13, device: str = GB10.name) -> MarlinParameters | None:
    found = lookup.find_marlin_table(device, shape)
    return None if found is None else found[1].row(rows)


def test_marlins_own_file_of_the_user_comes_first(folders: Folders) -> None:
    assert parameters() is None
    lookup.clear_cache()
    store_marlin(folders.shipped, thread_k=64, thread_n=128)
    found = parameters()
    assert found is not None
    assert (found.thread_k, found.thread_n) == (64, 128)
    lookup.clear_cache()
    store_marlin(folders.user)
    found = parameters()
    assert found is not None
    assert (found.thread_k, found.thread_n) == (128, 64)


def test_another_shape_device_or_batch_has_no_parameters(folders: Folders) -> None:
    store_marlin(folders.shipped)
    assert parameters(8) is not None
    assert parameters(9) is None, "above the largest row vLLM chooses"
    assert parameters(shape=W2) is None
    assert parameters(shape=W13.model_copy(update={"group_size": 64})) is None
    assert parameters(device="NVIDIA_H200") is None


def test_files_are_read_once(folders: Folders) -> None:
    path = store_marlin(folders.user)
    first = parameters()
    path.unlink()
    assert parameters() is first is not None


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.write_text("{"), "is not a Marlin table"),
        (lambda path: path.write_text(path.read_text().replace('"size_n": 768', '"size_n": 512')), "another shape"),
    ],
)
def test_a_bad_file_of_the_user_costs_a_sentence(
    folders: Folders, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], object], why: str
) -> None:
    store_marlin(folders.shipped, thread_k=64, thread_n=128)
    path = store_marlin(folders.user)
    spoil(path)
    with caplog.at_level(logging.WARNING):
        found = parameters()
    assert found is not None
    assert found.thread_k == 64, "this project's is used"
    assert str(path) in caplog.text
    assert why in caplog.text


def test_a_fused_moe_table_and_its_place(folders: Folders) -> None:
    arguments = (GB10.name, MOE.experts, MOE.size_n, MOE.dtype, None)
    assert lookup.find_fused_moe_table(*arguments) is None
    lookup.clear_cache()
    shipped = store_moe(folders.shipped, 64)
    found = lookup.find_fused_moe_table(*arguments)
    assert found is not None
    assert found[0] == shipped
    assert found[1][1]["BLOCK_SIZE_N"] == 64
    lookup.clear_cache()
    mine = store_moe(folders.user, 32)
    found = lookup.find_fused_moe_table(*arguments)
    assert found is not None
    assert (found[0], found[1][1]["BLOCK_SIZE_N"]) == (mine, 32)


def test_a_folder_that_cannot_be_read_costs_a_sentence(folders: Folders, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever serves may be another user than the one who tuned; this project's tables are used then."""
    marlin, moe = store_marlin(folders.shipped), store_moe(folders.shipped, 64)
    store_marlin(folders.user)
    store_moe(folders.user, 32)
    with no_entry(folders.user), caplog.at_level(logging.WARNING):
        found = lookup.find_marlin_table(GB10.name, W13)
        assert found is not None
        assert found[0] == marlin
        of_triton = lookup.find_fused_moe_table(GB10.name, MOE.experts, MOE.size_n, MOE.dtype, None)
        assert of_triton is not None
        assert of_triton[0] == moe
        assert [table.shape for table in lookup.marlin_tables_for_experts(GB10.name)] == [W13]
        assert lookup.table_files(GB10.name, "fused_moe") == [moe]
    assert len(caplog.records) == 4
    for record in caplog.records:
        assert f"{folders.user}" in record.getMessage()
        assert "cannot be read (Permission denied)" in record.getMessage()


def test_a_table_without_provenance_serves(folders: Folders) -> None:
    path = store_moe(folders.user, 64)
    provenance_path(path).unlink()
    assert lookup.find_fused_moe_table(GB10.name, MOE.experts, MOE.size_n, MOE.dtype, None) is not None


# ---- calls of Marlin's operator ----

PARAMETERS_26 = """
    input output b_qweight b_bias b_scales a_scales global_scale b_qzeros g_idx perm workspace sorted_token_ids
    expert_ids num_tokens_past_padded topk_weights moe_block_size top_k mul_topk_weights b_q_type size_m size_n size_k
    is_k_full use_atomic_add use_fp32_reduce is_zp_float thread_k thread_n blocks_per_sm
""".split()  # noqa: SIM905
PARAMETERS_30 = [name for name in PARAMETERS_26 if name not in ("g_idx", "perm", "is_k_full")]
BY_NAME = PARAMETERS_26.index("moe_block_size")  # from here on, vLLM gives arguments by name


def call(parameters: list[str], shape: MarlinShape, rows: int, **given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as vLLM's `_fused_marlin_moe` gives them, with tensors that have a shape and no memory."""
    import torch
    from vllm.scalar_type import scalar_types

    def tensor(*size: int) -> torch.Tensor:
        return torch.empty(size, device="meta")

    first = shape.kernel == "moe_w13"
    groups = shape.size_k // shape.group_size if shape.group_size > 0 else 1
    values = {
        "b_qweight": tensor(shape.experts, shape.size_k // 16, shape.size_n * 2),
        "b_scales": tensor(shape.experts, groups, shape.size_n),
        "workspace": tensor(LOCKS),
        "topk_weights": tensor(rows, shape.top_k),
        "moe_block_size": 8,
        "top_k": shape.top_k if first else 1,
        "b_q_type": getattr(scalar_types, shape.quant_type),
        "size_m": rows if first else rows * shape.top_k,
        "size_n": shape.size_n,
        "size_k": shape.size_k,
        **given,
    }
    names = parameters[: parameters.index("thread_k")]
    positional = [name for name in names if name in PARAMETERS_26[:BY_NAME]]
    args = tuple(values.get(name) for name in positional)
    return args, {name: values.get(name) for name in names[len(positional) :]}


@pytest.fixture(params=[PARAMETERS_26, PARAMETERS_30], ids=["0.26", "0.30"])
def operator(request: pytest.FixtureRequest) -> list[str]:
    names: list[str] = request.param
    return names


def test_a_call_gets_the_tables_tile(folders: Folders, operator: list[str]) -> None:
    store_marlin(folders.shipped)
    store_marlin(folders.shipped, W2, thread_k=64, thread_n=128, blocks_per_sm=3)
    calls = MarlinCalls(operator, GB10)
    for rows in (1, 2, 8):
        assert calls.overrides(*call(operator, W13, rows)) == CHANGES
        assert calls.overrides(*call(operator, W2, rows)) == {"thread_k": 64, "thread_n": 128, "blocks_per_sm": 3}
    assert calls.overrides(*call(operator, W13, 16, moe_block_size=8)) == {}


def test_top_1_experts_are_told_apart_by_their_shape(folders: Folders, operator: list[str]) -> None:
    store_marlin(folders.shipped, W13.model_copy(update={"top_k": 1}))
    store_marlin(folders.shipped, W2.model_copy(update={"top_k": 1}), thread_k=64, thread_n=128)
    calls = MarlinCalls(operator, GB10)
    assert calls.overrides(*call(operator, W13.model_copy(update={"top_k": 1}), 4))["thread_k"] == 128
    assert calls.overrides(*call(operator, W2.model_copy(update={"top_k": 1}), 4))["thread_k"] == 64


def test_one_group_is_no_group_to_the_kernel(folders: Folders, operator: list[str]) -> None:
    for group_size in (-1, 128):
        shape = W2.model_copy(update={"size_k": 128, "group_size": group_size})
        lookup.clear_cache()
        path = store_marlin(folders.shipped, shape)
        assert MarlinCalls(operator, GB10).overrides(*call(operator, shape, 1)) == CHANGES
        path.unlink()


@pytest.mark.parametrize(
    ("values", "given", "why"),
    [
        ({"block_size_m": 16}, {}, "block_size_m=16"),
        ({}, {"moe_block_size": 16}, "block_size_m=8"),
        ({"thread_n": 256, "thread_k": 64}, {}, "no kernel is compiled"),
        ({"blocks_per_sm": 5}, {}, "blocks_per_sm is 5"),
        ({"blocks_per_sm": 4}, {}, "shared memory"),
        ({"blocks_per_sm": 2}, {"workspace": 95}, "96 locks, and vLLM allocates 95"),
    ],
)
def test_what_does_not_fit_leaves_vllms_choice_and_says_so(
    folders: Folders,
    operator: list[str],
    caplog: pytest.LogCaptureFixture,
    values: dict[str, Any],
    given: dict[str, Any],
    why: str,
) -> None:
    import torch

    store_marlin(folders.shipped, **values)
    if "workspace" in given:
        given = {"workspace": torch.empty(given["workspace"], device="meta")}
    calls = MarlinCalls(operator, GB10)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert calls.overrides(*call(operator, W13, 1, **given)) == {}
    assert [why in record.getMessage() for record in caplog.records] == [True], caplog.text


def test_a_tile_that_does_not_divide_is_left_out(
    folders: Folders, operator: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    shape = W2.model_copy(update={"size_k": 704, "group_size": 64})
    store_marlin(folders.shipped, shape)
    with caplog.at_level(logging.WARNING):
        assert MarlinCalls(operator, GB10).overrides(*call(operator, shape, 1)) == {}
    assert "K=704 is not a multiple of thread_k=128" in caplog.text


def test_other_kernels_are_left_alone(folders: Folders, operator: list[str]) -> None:
    """8-bit inputs, weights in an order of their own, and experts' batches have kernels that no table is for."""
    import torch

    store_marlin(folders.shipped)
    calls = MarlinCalls(operator, GB10)
    assert calls.overrides(*call(operator, W13, 1, a_scales=torch.empty(1, device="meta"))) == {}
    assert calls.overrides(*call(operator, W13, 1, topk_weights=torch.empty(16, 8, device="meta"))) == {}
    if "g_idx" in operator:
        assert calls.overrides(*call(operator, W13, 1, g_idx=torch.empty(128, 2048, device="meta"))) == {}
        assert calls.overrides(*call(operator, W13, 1, g_idx=torch.empty(128, 0, device="meta"))) == CHANGES


def test_sums_change_only_where_the_table_says_so(folders: Folders, operator: list[str]) -> None:
    own: dict[str, Any] = {"thread_k": -1, "thread_n": -1, "blocks_per_sm": -1}
    store_marlin(folders.shipped, **own)
    store_marlin(folders.shipped, W2, **own, use_atomic_add=True, use_fp32_reduce=False)
    calls = MarlinCalls(operator, GB10)
    assert calls.overrides(*call(operator, W13, 1)) == {}
    assert calls.overrides(*call(operator, W2, 1)) == {"use_atomic_add": True, "use_fp32_reduce": False}


@pytest.mark.parametrize(
    ("locks", "expected"), [(48, {"thread_k": 128, "thread_n": 64, "blocks_per_sm": -1}), (47, {})]
)
def test_a_tile_that_leaves_the_blocks_open_gets_one_block(
    folders: Folders, operator: list[str], locks: int, expected: dict[str, int]
) -> None:
    """The kernel takes -1 for 1; a table of that kind passes the check."""
    import torch

    store_marlin(folders.shipped, blocks_per_sm=-1)
    given = call(operator, W13, 1, workspace=torch.empty(locks, device="meta"))
    assert MarlinCalls(operator, GB10).overrides(*given) == expected


VLLMS_TILE: dict[str, Any] = {"thread_k": -1, "thread_n": -1, "blocks_per_sm": -1}


def test_marlins_tables_for_experts_that_change_a_call(folders: Folders) -> None:
    assert lookup.marlin_tables_for_experts(GB10.name) == []
    store_moe(folders.user, 64)
    store_marlin(folders.user, W2.model_copy(update={"kernel": "dense", "experts": 1, "top_k": 1}))
    store_marlin(folders.user, W2, **VLLMS_TILE)
    assert lookup.marlin_tables_for_experts(GB10.name) == []
    store_marlin(folders.shipped)
    assert [table.shape for table in lookup.marlin_tables_for_experts(GB10.name)] == [W13]
    assert lookup.marlin_tables_for_experts("NVIDIA_GB1") == []
    lookup.clear_cache()
    store_marlin(folders.user, **VLLMS_TILE)
    assert lookup.marlin_tables_for_experts(GB10.name) == [], "the user's own comes first"


def test_one_line_for_each_shape(folders: Folders, operator: list[str], caplog: pytest.LogCaptureFixture) -> None:
    path = store_marlin(folders.shipped)
    calls = MarlinCalls(operator, GB10)
    with caplog.at_level(logging.INFO):
        for rows in (1, 2, 64):
            calls.overrides(*call(operator, W13, rows))
            calls.overrides(*call(operator, W2, rows))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert str(path) in lines[0]
    assert lines[0].endswith("(3 rows derived (a guess)); other steps use vLLM's default.")
    assert lines[1].startswith("No tuned Marlin table for down of 128 experts")


def test_widths_that_no_table_has_cost_no_look_up(
    folders: Folders, operator: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store_marlin(folders.shipped)
    calls = MarlinCalls(operator, GB10, {(W13.size_n, W13.size_k)})
    caplog.set_level(logging.INFO)
    assert calls.overrides(*call(operator, W2, 1)) == {}
    assert "No tuned Marlin table for down of 128 experts" in caplog.text
    with monkeypatch.context() as patched:
        patched.setattr(calls, "_choose", None)
        patched.setattr(calls, "_argument", None)
        assert calls.overrides(*call(operator, W2, 2)) == {}
    assert calls.overrides(*call(operator, W13, 1)) == CHANGES
    assert calls.overrides(*call(operator, W13, 2)) == CHANGES, "a table has these widths"


# ---- the Triton kernel's tables ----


@pytest.fixture
def on_gb10(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> Folders:
    monkeypatch.setattr(runtime, "device_name", lambda: GB10.name)
    return folders


VLLMS = {1: {"BLOCK_SIZE_N": 256}}


def chosen(of_vllm: Callable[[], Any] = lambda: VLLMS) -> Any:
    found = runtime.choose_fused_moe_table(MOE.experts, MOE.size_n, MOE.dtype, 0, 0, of_vllm)
    return found and found[1]["BLOCK_SIZE_N"]


def test_the_order_of_fused_moe_tables(
    on_gb10: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    assert chosen() == 256
    assert "comes with vLLM" in caplog.text
    assert chosen(lambda: None) is None
    lookup.clear_cache()
    store_moe(on_gb10.shipped, 64)
    assert chosen() == 64
    place = on_gb10.shipped / "fused_moe"
    assert f"from {place} (1 row derived (a guess); other rows are vLLM's choice)" in caplog.text
    lookup.clear_cache()
    store_moe(on_gb10.user, 32)
    assert chosen() == 32
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path / "theirs"))
    assert chosen() == 32, "there is nothing in it"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / MOE.file_name(GB10.name)).write_text("{}")
    assert chosen() == 256, "vLLM reads it"
    assert "VLLM_TUNED_CONFIG_FOLDER" in caplog.text


def test_a_shipped_table_that_says_nothing_leaves_vllms(on_gb10: Folders, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = store_moe(on_gb10.shipped, 64, rule=VLLM_DEFAULT)
    assert chosen() == 256
    assert (
        f"the table that comes with vLLM is used: the table in {path.parent} only repeats vLLM's choice" in caplog.text
    )
    assert chosen(lambda: None) is None
    assert f"vLLM's default is used: the table in {path.parent} only repeats vLLM's choice" in caplog.text
    store_moe(on_gb10.user, 64, rule=VLLM_DEFAULT)
    lookup.clear_cache()
    assert chosen() == 64, "the user's counts, whatever"


def tuned_with(folder: Path, vllm: str, shape: FusedMoeExperts, rows: dict[int, FusedMoeParameters | None]) -> None:
    """A table of the tuner, of whose rows some are vLLM's; with rows that this vLLM would not choose."""
    from vllm_spark.tune.results import FusedMoeOutcome
    from vllm_spark.tune.tables import NewFusedMoeTable, new_tables, store_tables

    versions = {"vllm": vllm}
    outcomes = [
        FusedMoeOutcome(
            shape=shape, rows=number, parameters=row, default_us=1.0, tuned_us=1.0, ratio=0.9 if row else 1.0, tried=[]
        )
        for number, row in rows.items()
    ]
    (table,) = new_tables(outcomes, {}, GB10, versions)
    assert isinstance(table, NewFusedMoeTable)
    choice = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 16}
    spoilt = {number: row if rows.get(number) else choice for number, row in table.table.rows.items()}
    store_tables([dataclasses.replace(table, table=FusedMoeTable(spoilt))], folder)


TUNED = FusedMoeParameters(BLOCK_SIZE_M=16, BLOCK_SIZE_N=32, BLOCK_SIZE_K=128, num_warps=4, num_stages=4)
EXPERTS = FusedMoeExperts(experts=128, top_k=8, hidden=2048, intermediate=384)
FP8_BLOCK = FusedMoeExperts(
    experts=256, top_k=8, hidden=2048, intermediate=512, dtype="fp8_w8a8", block_shape=(128, 128)
)
"""Of which vLLM 0.32 and later have a table of their own."""


@pytest.fixture(scope="module")
def this_vllm() -> str:
    return str(pytest.importorskip("vllm").__version__)


def taken(shape: FusedMoeExperts) -> dict[int, Any] | None:
    lookup.clear_cache()
    height, width = shape.block_shape or (None, None)
    return runtime.choose_fused_moe_table(shape.experts, shape.intermediate, shape.dtype, height, width, lambda: None)


@pytest.mark.parametrize("shape", [EXPERTS, EXPERTS.model_copy(update={"dtype": "fp8_w8a8"}), FP8_BLOCK])
def test_rows_that_another_vllm_chose_are_this_ones(
    on_gb10: Folders, this_vllm: str, shape: FusedMoeExperts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tuned_with(on_gb10.user, "0.1", shape, {2: TUNED, 4: None})
    rows = taken(shape)
    assert rows is not None
    assert FusedMoeTable(rows).row(2) == TUNED.row(), "what was tuned stays"
    for tokens in (1, 3, 4, 5, 8, 9, 33, 64, 65, 500, 2048, 8000):
        assert FusedMoeTable(rows).row(tokens) == vllm_row(shape, GB10.name, tokens), tokens
    assert f"default rows of vLLM 0.1 were replaced by those of {this_vllm}" in caplog.text
    tuned_with(on_gb10.user, this_vllm, shape, {2: TUNED})
    rows = taken(shape)
    assert rows is not None
    assert rows[64]["BLOCK_SIZE_N"] == 16, "as the file says"


def test_another_build_of_the_same_vllm_chooses_the_same(
    on_gb10: Folders, this_vllm: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As the CPU build with which this project's tables are written, and the build that serves."""
    caplog.set_level(logging.INFO)
    tuned_with(on_gb10.user, f"{this_vllm.partition('+')[0]}+cu130", EXPERTS, {2: TUNED})
    assert taken(EXPERTS) is not None
    assert "were replaced" not in caplog.text


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        (EXPERTS, {2: None, 4: None}),
        (EXPERTS.model_copy(update={"dtype": "int4_w4a16", "group_size": 128}), {2: TUNED}),
    ],
)
def test_a_table_that_another_vllm_chose_is_left_out(
    on_gb10: Folders, this_vllm: str, shape: FusedMoeExperts, rows: dict[int, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tuned_with(on_gb10.user, "0.1", shape, rows)
    assert taken(shape) is None
    assert "default rows of vLLM 0.1; tune again" in caplog.text
    tuned_with(on_gb10.user, this_vllm, shape, rows)
    assert taken(shape) is not None


def test_batch_invariance_takes_no_table(on_gb10: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    store_moe(on_gb10.user, 32)
    assert chosen(lambda: None) == 32
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert chosen(lambda: None) is None


def test_layers_with_atomic_add(on_gb10: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_spark.backend import platform

    monkeypatch.setattr(platform, "compute_capability", lambda: (12, 1))
    dense = MarlinShape(
        kernel="dense", experts=1, top_k=1, size_n=512, size_k=2048, group_size=128, quant_type="uint4b8"
    )
    own: dict[str, Any] = {"thread_k": -1, "thread_n": -1, "blocks_per_sm": -1, "block_size_m": None}
    assert runtime.layers_with_atomic_add() == frozenset()
    store_marlin(on_gb10.shipped, dense, **own, use_atomic_add=True)
    store_marlin(on_gb10.shipped, dense.model_copy(update={"size_n": 1024}), **own)
    assert runtime.layers_with_atomic_add() == {(512, 2048)}
    monkeypatch.setattr(platform, "compute_capability", lambda: (8, 9))
    assert runtime.layers_with_atomic_add() == frozenset(), "it has no such instruction for bfloat16"
    monkeypatch.setattr(platform, "compute_capability", lambda: (12, 1))
    store_marlin(on_gb10.user, dense, **own)
    assert runtime.layers_with_atomic_add() == frozenset(), "the user's own says no"


def test_tables_for_a_device(on_gb10: Folders) -> None:
    assert not runtime.has_tables(GB10.name)
    store_moe(on_gb10.shipped, 64)
    assert runtime.has_tables(GB10.name)
    assert not runtime.has_tables("NVIDIA_GB1")


class MarlinExperts:
    """What vLLM's class of this name shows of its weights: scales of each expert, groups times output width."""

    def __init__(self, *shapes: MarlinShape) -> None:
        for name, shape in zip(("w1_scale", "w2_scale"), shapes, strict=False):
            groups = shape.size_k // shape.group_size if shape.group_size > 0 else 1
            setattr(self, name, SimpleNamespace(shape=(shape.experts, groups, shape.size_n)))


class TritonExperts: ...


class TritonWNA16Experts(TritonExperts): ...


class FallbackExperts: ...


class TritonOrDeepGemmExperts(FallbackExperts): ...


class SomeExperts: ...


class SomeMoEMethod:
    """A quantization method that calls the operator without an object for experts."""


def layer(experts: object) -> SimpleNamespace:
    return SimpleNamespace(quant_method=SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=experts)))


def worker_of(*layers: object, draft: tuple[object, ...] = ()) -> SimpleNamespace:
    drafter = SimpleNamespace(model=SimpleNamespace(modules=lambda: list(draft)))
    return SimpleNamespace(
        get_model=lambda: SimpleNamespace(modules=lambda: list(layers)),
        model_runner=SimpleNamespace(drafter=drafter),
    )


@pytest.fixture
def hooks(on_gb10: Folders, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the patches that are applied."""
    applied: set[str] = set()
    monkeypatch.setattr(runtime, "apply_all", lambda when, names: applied.update(names))
    monkeypatch.setattr(runtime, "remove", applied.discard)
    return applied


MARLIN_HOOK = {"marlin-parameters"}


def test_marlins_operator_is_replaced_for_layers_with_a_tuned_row(on_gb10: Folders, hooks: set[str]) -> None:
    other = W13.model_copy(update={"size_n": 1536})
    runtime.model_loaded(worker_of(layer(MarlinExperts(W13, W2))))
    assert hooks == set(), "there is no table"
    store_marlin(on_gb10.user, W2)
    for layers, hooked in (
        ((layer(MarlinExperts(W13, W2)), layer(MarlinExperts(other, W13))), True),
        ((layer(MarlinExperts(other, W13)),), False),
        ((layer(MarlinExperts(W2.model_copy(update={"experts": 64}), W2.model_copy(update={"experts": 64}))),), False),
        ((layer(MarlinExperts(W13, W2.model_copy(update={"group_size": 64}))),), False),
        ((layer(TritonExperts()), layer(SomeExperts()), SimpleNamespace()), False),
        ((layer(MarlinExperts()),), True),  # nothing is known of its weights
        ((SimpleNamespace(quant_method=SomeMoEMethod()),), True),
        ((), False),
    ):
        runtime.model_loaded(worker_of(*layers))
        assert hooks == (MARLIN_HOOK if hooked else set()), layers
    runtime.model_loaded(worker_of(layer(TritonExperts()), draft=(layer(MarlinExperts(W13, W2)),)))
    assert hooks == MARLIN_HOOK, "the draft model has such a layer"
    runtime.model_loaded(worker_of())
    runtime.model_loaded(SimpleNamespace())
    assert hooks == MARLIN_HOOK, "a worker that does not show its model"


def test_rows_of_vllms_choice_replace_nothing(on_gb10: Folders, hooks: set[str]) -> None:
    store_marlin(on_gb10.user, **VLLMS_TILE)
    runtime.model_loaded(worker_of(layer(MarlinExperts(W13, W2))))
    assert hooks == set()


def test_a_column_of_one_group(on_gb10: Folders, hooks: set[str]) -> None:
    for group_size in (-1, 384):
        lookup.clear_cache()
        path = store_marlin(on_gb10.user, W2.model_copy(update={"group_size": group_size}))
        runtime.model_loaded(worker_of(layer(MarlinExperts(W13, W2.model_copy(update={"group_size": -1})))))
        assert hooks == MARLIN_HOOK
        path.unlink()


def test_experts_whose_kernel_reads_no_table(
    on_gb10: Folders, hooks: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    layers = [
        layer(kind())
        for kind in (MarlinExperts, MarlinExperts, TritonWNA16Experts, TritonOrDeepGemmExperts, SomeExperts)
    ]
    layers += [SimpleNamespace(), SimpleNamespace(quant_method=SimpleNamespace(moe_kernel=None))]
    with caplog.at_level(logging.INFO):
        runtime.model_loaded(worker_of(*layers))
        runtime.model_loaded(SimpleNamespace())
    rest = [
        "Experts of 1 layer: TritonOrDeepGemmExperts uses FusedMoE tables only for calls that it passes to Triton.",
        "Experts of 1 layer: SomeExperts does not use tables, vLLM's own choice stays.",
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "Experts of 2 layers: MarlinExperts has no tuned table for its shapes on NVIDIA_GB10; vLLM's own choice is "
        "used.",
        *rest,
    ]
    caplog.clear()
    store_marlin(on_gb10.user)
    with caplog.at_level(logging.INFO):
        runtime.model_loaded(worker_of(*layers))
    assert [record.getMessage() for record in caplog.records] == [
        "Experts of 2 layers: MarlinExperts uses Marlin tables, not FusedMoE tables.",
        *rest,
    ]
