"""Tuned parameters on a GPU: the same results within rounding, padding and repeated scales exact, tables in use.

Where a test asks for equal bits, inputs and weights are such that every sum is a small whole number: then any order of
adding is exact, and whatever differs is wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_spark.kernels import runtime
from vllm_spark.kernels.marlin.table import FOLDER, Kernel, MarlinParameters, MarlinRow, MarlinShape, MarlinTable
from vllm_spark.kernels.marlin.table import store_marlin_table as store
from vllm_spark.models.regroup import repeat_scales

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(600)

ROWS = (1, 2, 4, 8)
# Qwen3-30B-A3B, groups of 128, whole and halved: an expert's gate and up, and its down.
SHARDS: dict[str, tuple[Kernel, int, int]] = {
    "w13-tp1": ("moe_w13", 1536, 2048),
    "w2-tp1": ("moe_w2", 2048, 768),
    "w13-tp2": ("moe_w13", 768, 2048),
    "w2-tp2": ("moe_w2", 2048, 384),
}


def shard(name: str) -> MarlinShape:
    kernel, size_n, size_k = SHARDS[name]
    return MarlinShape(
        kernel=kernel, experts=128, top_k=8, size_n=size_n, size_k=size_k, group_size=128, quant_type="uint4b8"
    )


def assert_within_rounding(mine: torch.Tensor, theirs: torch.Tensor, *, weighted: bool) -> None:
    """Both sums are float32 and rounded to bfloat16 once; weighted ones are multiplied there and rounded again."""
    assert torch.isfinite(theirs).all()
    assert theirs.float().std() > 0.05, "there is something to compare"
    # A unit in the last place is 2^-7 of the smallest number with its exponent.
    relative = 2**-6 if weighted else 2**-7
    torch.testing.assert_close(mine.float(), theirs.float(), rtol=relative, atol=2**-11)


# ---- every tile ----


@pytest.fixture(scope="module", params=SHARDS)
def weights(request: pytest.FixtureRequest) -> Iterator[tuple[MarlinShape, list[Any]]]:
    """A shape of the model and one layer's random weights."""
    from vllm_spark.tune.marlin.problem import random_weights

    shape = shard(request.param)
    yield shape, [random_weights(shape, seed=1)]
    torch.cuda.empty_cache()


@pytest.mark.parametrize("rows", ROWS)
def test_tiles_agree_with_vllms_choice(weights: tuple[MarlinShape, list[Any]], rows: int) -> None:
    from vllm_spark.tune.marlin.problem import MarlinProblem
    from vllm_spark.tune.marlin.search import search_space

    shape, layers = weights
    problem = MarlinProblem(shape, layers, rows, calls=1, seed=rows)
    default = problem.call(0, MarlinParameters()).clone()
    candidates = search_space(shape, runtime.this_device())
    assert len({(each.thread_k, each.thread_n) for each in candidates}) == 3, "every compiled tile divides these"
    for candidate in candidates:
        problem.output.fill_(torch.nan)
        tuned = problem.call(0, candidate).clone()
        assert_within_rounding(tuned, default, weighted=shape.kernel == "moe_w2")


def test_other_weights_do_not_agree(weights: tuple[MarlinShape, list[Any]]) -> None:
    """What the comparison would say of a wrong result."""
    from vllm_spark.tune.marlin.problem import MarlinProblem, random_weights

    shape, layers = weights
    mine = MarlinProblem(shape, layers, 1, calls=1, seed=1).call(0, MarlinParameters()).clone()
    theirs = MarlinProblem(shape, [random_weights(shape, seed=2)], 1, calls=1, seed=1).call(0, MarlinParameters())
    with pytest.raises(AssertionError, match="not close"):
        assert_within_rounding(mine, theirs, weighted=shape.kernel == "moe_w2")


# ---- the table in use ----


def experts(shape_13: MarlinShape, shape_2: MarlinShape, rows: int) -> dict[str, Any]:
    """Arguments of vLLM's whole block of experts on Marlin."""
    from vllm.scalar_type import scalar_types

    from vllm_spark.tune.marlin.problem import random_weights
    from vllm_spark.tune.timing import route

    first, second = random_weights(shape_13, seed=3), random_weights(shape_2, seed=4)
    routed, chosen = (tensor.cuda() for tensor in route(rows, shape_13.experts, shape_13.top_k, 5))
    generator = torch.Generator(device="cuda").manual_seed(6)
    hidden = torch.randn(rows, shape_13.size_k, device="cuda", dtype=torch.bfloat16, generator=generator)
    return {
        "hidden_states": hidden,
        "w1": first.quantized,
        "w2": second.quantized,
        "bias1": None,
        "bias2": None,
        "w1_scale": first.scales,
        "w2_scale": second.scales,
        "topk_weights": routed.float(),
        "topk_ids": chosen,
        "quant_type_id": scalar_types.uint4b8.id,
    }


@contextmanager
def serving_with_tables() -> Iterator[None]:
    """What an engine of a pair does with its process."""
    engine = SimpleNamespace(additional_config={})
    runtime.start(engine)
    try:
        yield
    finally:
        runtime.stop(engine)


def test_vllms_experts_run_with_the_tables_parameters(user_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own caller, the real operator, and a table of the user's for each of its two calls."""
    import vllm._custom_ops as ops
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe

    from vllm_spark.compat.patching import all_patches

    tiles = {
        "w13-tp2": MarlinRow(thread_k=128, thread_n=64, blocks_per_sm=2, block_size_m=8),
        "w2-tp2": MarlinRow(thread_k=128, thread_n=128, blocks_per_sm=1, block_size_m=8, use_atomic_add=True),
    }
    for name, row in tiles.items():
        store(MarlinTable(device=runtime.device_name(), shape=shard(name), rows={4: row}), user_tables / FOLDER)
    four, five = (experts(shard("w13-tp2"), shard("w2-tp2"), rows) for rows in (4, 5))
    default = fused_marlin_moe(**four).clone()

    original = ops.moe_wna16_marlin_gemm
    if hasattr(original, "__wrapped__"):  # a process that serves
        original = original.__wrapped__
    signature = inspect.signature(original)
    seen: list[dict[str, Any]] = []

    def operator(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        seen.append(bound.arguments)
        if bound.arguments["use_atomic_add"]:
            bound.arguments["output"].fill_(torch.nan)  # the kernel must clear it before it adds
        return original(*bound.args, **bound.kwargs)

    def parameters() -> list[tuple[Any, ...]]:
        fields = ("thread_k", "thread_n", "blocks_per_sm", "use_atomic_add", "use_fp32_reduce")
        return [tuple(each[field] for field in fields) for each in seen]

    operator.__signature__ = signature  # type: ignore[attr-defined]
    patch = next(each for each in all_patches() if each.name == "marlin-parameters")
    with serving_with_tables():
        monkeypatch.setattr(ops, "moe_wna16_marlin_gemm", patch.replace(operator))
        tuned = fused_marlin_moe(**four)
        assert parameters() == [(128, 64, 2, False, True), (128, 128, 1, True, True)]
        scale = default.float().abs().max().item()
        torch.testing.assert_close(tuned.float(), default.float(), rtol=2**-5, atol=2**-7 * scale)
        seen.clear()
        fused_marlin_moe(**five)
        assert set(parameters()) == {(-1, -1, -1, False, True)}, "above the table"
    seen.clear()
    assert torch.equal(fused_marlin_moe(**four), default), "as without tables"
    assert set(parameters()) == {(-1, -1, -1, False, True)}


# ---- padding, and repeated scales ----


def matrix(size_k: int, size_n: int, group_size: int) -> dict[str, torch.Tensor]:
    """A matrix as GPTQ stores it: weights -8 to 7, every scale a power of two."""
    generator = torch.Generator().manual_seed(size_k + size_n)
    weights = torch.randint(16, (size_k, size_n), generator=generator)
    packed = sum(weights[place::8] << (4 * place) for place in range(8))
    assert isinstance(packed, torch.Tensor)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    scales = 2.0 ** torch.randint(-1, 2, (size_k // group_size, size_n), generator=generator)
    return {"x.qweight": packed, "x.scales": scales.bfloat16(), "values": weights - 8}


def sparse_input(rows: int, size_k: int) -> torch.Tensor:
    """Eight ones in each row, of either sign: sums stay whole halves below 128."""
    generator = torch.Generator().manual_seed(rows)
    inputs = torch.zeros(rows, size_k)
    for row in inputs:
        places = torch.randperm(size_k, generator=generator)[:8]
        row[places] = torch.randint(2, (8,), generator=generator).float() * 2 - 1
    return inputs


def expected(inputs: torch.Tensor, tensors: dict[str, torch.Tensor], group_size: int) -> torch.Tensor:
    values = tensors["values"].double() * tensors["x.scales"].double().repeat_interleave(group_size, 0)
    return inputs.double() @ values


def product(
    inputs: torch.Tensor, tensors: dict[str, torch.Tensor], group_size: int, padded: tuple[int, int] | None = None
) -> torch.Tensor:
    """What vLLM's linear layer computes on Marlin, its weights padded to `padded` (N, K), or as vLLM pads them."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    size_k, size_n = tensors["x.qweight"].shape[0] * 8, tensors["x.qweight"].shape[1]
    padded_n, padded_k = padded or marlin_utils.marlin_padded_nk(size_n, size_k, group_size)
    sizes = (size_n, size_k, padded_n, padded_k)
    weights = marlin_utils.marlin_pad_qweight(tensors["x.qweight"].cuda(), *sizes).contiguous()
    scales = marlin_utils.marlin_pad_scales(tensors["x.scales"].cuda(), *sizes, group_size).contiguous()
    empty = torch.empty(0, dtype=torch.int, device="cuda")
    repack = inspect.signature(ops.gptq_marlin_repack).parameters
    weights = ops.gptq_marlin_repack(
        weights, **({"perm": empty} if "perm" in repack else {}), size_k=padded_k, size_n=padded_n, num_bits=4
    )
    scales = marlin_utils.marlin_permute_scales(scales, size_k=padded_k, size_n=padded_n, group_size=group_size)
    given = {
        "input": inputs.bfloat16().cuda(),
        "weight": weights,
        "weight_scale": scales,
        "weight_zp": empty,
        "g_idx": empty,
        "g_idx_sort_indices": empty,
        "workspace": marlin_utils.marlin_make_workspace_new(torch.device("cuda", torch.cuda.current_device())),
        "wtype": scalar_types.uint4b8,
        "output_size_per_partition": size_n,
        "input_size_per_partition": size_k,
        "is_k_full": True,
    }
    known = inspect.signature(marlin_utils.apply_gptq_marlin_linear).parameters
    arguments = {name: value for name, value in given.items() if name in known}
    return marlin_utils.apply_gptq_marlin_linear(**arguments).cpu()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("size_n", "size_k", "group_size"),
    [(32, 2048, 128), (32, 2048, 64), (96, 1024, 128), (2048, 704, 64), (4096, 5472, 32), (64, 704, 64)],
)
def test_shards_that_no_tile_divides_are_exact(rows: int, size_n: int, size_k: int, group_size: int) -> None:
    tensors = matrix(size_k, size_n, group_size)
    inputs = sparse_input(rows, size_k)
    assert torch.equal(product(inputs, tensors, group_size).double(), expected(inputs, tensors, group_size))


@pytest.mark.parametrize(
    ("size_n", "size_k", "padded"), [(64, 2048, (128, 2048)), (256, 704, (256, 768)), (128, 1024, (256, 1152))]
)
def test_padding_changes_no_bit(size_n: int, size_k: int, padded: tuple[int, int]) -> None:
    """Shards that run as they are."""
    tensors = matrix(size_k, size_n, 64)
    for rows in ROWS:
        inputs = sparse_input(rows, size_k)
        plain = product(inputs, tensors, 64, (size_n, size_k))
        again = product(inputs, tensors, 64, padded)
        assert plain.abs().max() > 0
        assert torch.equal(plain.view(torch.int16), again.view(torch.int16))


@pytest.mark.parametrize(("size_k", "group_size", "smaller"), [(1408, 128, 64), (10944, 64, 32)])
def test_halves_with_repeated_scales_add_up(size_k: int, group_size: int, smaller: int) -> None:
    """GLM-4.5-Air's widths: whole matrices with their own groups, against two ranks' parts with half of these."""

    class Config:
        spark_repeated_scales = ("gptq", group_size // smaller)

    tensors = matrix(size_k, 512, group_size)
    again = dict(repeat_scales(tensors.items(), Config()))
    for rows in ROWS:
        inputs = sparse_input(rows, size_k)
        whole = product(inputs, tensors, group_size)
        halves = [
            product(inputs.chunk(2, 1)[rank], {name: each.chunk(2, 0)[rank] for name, each in again.items()}, smaller)
            for rank in range(2)
        ]
        assert torch.equal(whole.double(), expected(inputs, tensors, group_size))
        assert torch.equal((halves[0].double() + halves[1].double()), whole.double())
