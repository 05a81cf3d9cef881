"""What is tuned in a model, and the shard that its decode steps run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from vllm_spark.errors import ConfigurationError
from vllm_spark.files import configs_folder
from vllm_spark.models.layers import Experts
from vllm_spark.models.regroup import layers_as_served
from vllm_spark.models.shard import shard_as_model
from vllm_spark.models.weights import Int4
from vllm_spark.tune.plan import backend, backend_hints, check_version_takes_int4, not_read_by_default
from vllm_spark.tune.tuned_model import TunedModel, fused_moe_shapes, marlin_shapes, shapes_of

from .tuning_outcomes import (
    BF16,
    FP8_BLOCK,
    FP8_CHANNEL,
    INT4,
    W13,
    shipped,
)


def tuned(name: str, tp: int, quantization: dict[str, Any] | None = None) -> TunedModel:
    config = shipped(name)
    if quantization is not None:
        config["quantization_config"] = quantization
    return TunedModel(name, tp, layers_as_served(config, tp))


@pytest.mark.parametrize(
    ("name", "tp", "experts", "top_k", "sizes", "group_size"),
    [
        ("qwen3-30b-a3b-int4", 1, 128, 8, [(1536, 2048), (2048, 768)], 128),
        ("qwen3-30b-a3b-int4", 2, 128, 8, [(768, 2048), (2048, 384)], 128),
        ("qwen3-235b-a22b-int4", 2, 128, 8, [(1536, 4096), (4096, 768)], 128),
        ("qwen3-next-80b-a3b-int4", 2, 512, 10, [(512, 2048), (2048, 256)], 128),
        ("minimax-m2-int4", 2, 256, 8, [(1536, 3072), (3072, 768)], 128),
        ("glm-4.5-air-int4", 1, 128, 8, [(2816, 4096), (4096, 1408)], 128),
        # 704 inputs of a rank are 5.5 groups of 128.
        ("glm-4.5-air-int4", 2, 128, 8, [(1408, 4096), (4096, 704)], 64),
    ],
)
def test_gemms_of_int4_experts(
    name: str, tp: int, experts: int, top_k: int, sizes: list[tuple[int, int]], group_size: int
) -> None:
    shapes = marlin_shapes(tuned(name, tp))
    assert [shape.kernel for shape in shapes] == ["moe_w13", "moe_w2"]
    assert [(shape.size_n, shape.size_k) for shape in shapes] == sizes
    assert {(shape.experts, shape.top_k, shape.group_size) for shape in shapes} == {(experts, top_k, group_size)}


def test_gemms_of_int4_experts_are_those_after_vllms_padding() -> None:
    weights = Int4(group_size=32)
    layer = Experts("mlp.experts", 8, 2, hidden=256, intermediate=736, count=1, weights=weights)
    sizes = [(shape.size_n, shape.size_k) for shape in marlin_shapes(TunedModel("a", 1, [layer]))]
    assert sizes == [(1536, 256), (256, 768)]


def test_which_kernels_are_tuned() -> None:
    int4 = tuned("qwen3-30b-a3b-int4", 2)
    assert shapes_of(int4, "auto") == shapes_of(int4, "marlin") == marlin_shapes(int4)
    assert shapes_of(int4, "triton") == [INT4]
    for quantization, shape in (
        ({}, BF16),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, FP8_BLOCK),
        ({"quant_method": "fp8"}, FP8_CHANNEL),
    ):
        other = tuned("qwen3-30b-a3b-int4", 2, quantization)
        assert shapes_of(other, "auto") == shapes_of(other, "triton") == [shape]
        assert shapes_of(other, "marlin") == []


@pytest.mark.parametrize("name", ["llama-3.3-70b-int4", "qwen3-32b-int4", "gpt-oss-120b"])
def test_models_with_nothing_to_tune(name: str) -> None:
    for tp in (1, 2):
        assert shapes_of(tuned(name, tp), "auto") == shapes_of(tuned(name, tp), "triton") == []


@pytest.mark.parametrize(
    ("quantization", "why"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "704 are not multiples of the block size 128 x 128"),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, "and the group size is none"),
    ],
)
def test_experts_that_triton_does_not_take(quantization: dict[str, Any], why: str) -> None:
    model = tuned("glm-4.5-air-int4", 2, quantization)
    with pytest.raises(ConfigurationError, match=why):
        fused_moe_shapes(model, int4=True)


def test_which_tables_vllm_reads_by_itself() -> None:
    assert not_read_by_default(FP8_CHANNEL) is None
    for shape, theirs in ((INT4, "Marlin"), (FP8_BLOCK, "DeepGEMM"), (BF16, "FlashInfer")):
        assert theirs in str(not_read_by_default(shape))


@pytest.mark.parametrize("name", sorted(path.name for path in (configs_folder() / "models").iterdir()))
def test_a_shard_as_a_model_has_the_sizes_of_a_rank(name: str) -> None:
    config = shipped(name)
    before = json.dumps(config)
    shard = shard_as_model(config, 2)
    assert json.dumps(config) == before, "the given one stays as it was"
    assert shard_as_model(config, 1) == config
    text, of_rank = config.get("text_config", config), shard.get("text_config", shard)
    assert of_rank["num_attention_heads"] * 2 == text["num_attention_heads"]
    assert of_rank["hidden_size"] == text["hidden_size"]
    from vllm_spark.models.layers import model_layers

    def sizes(layers: Sequence[Any]) -> list[tuple[str, int, int]]:
        """Without the small projection of linear attention, which vLLM keeps whole on every rank for some formats."""
        return [
            (layer.name, layer.hidden, layer.intermediate)
            if isinstance(layer, Experts)
            else (layer.name, layer.size_n, layer.size_k)
            for layer in layers
            if not layer.name.endswith("in_proj_ba")
        ]

    assert sizes(model_layers(shard, 1)) == sizes(model_layers(config, 2))


def test_a_shard_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"num_attention_heads is 32, which 3 ranks cannot share.*--tp"):
        shard_as_model(shipped("qwen3-30b-a3b-int4"), 3)


@pytest.mark.parametrize(("tp", "heads"), [(2, 4), (4, 2), (8, 1)])
def test_a_rank_has_a_key_value_head_where_there_are_fewer_than_ranks(tp: int, heads: int) -> None:
    config = {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": heads}
    assert shard_as_model(config, tp)["num_key_value_heads"] == max(heads // tp, 1)
    with pytest.raises(ConfigurationError, match="num_key_value_heads is 3, which 4 ranks cannot share"):
        shard_as_model({"num_key_value_heads": 3}, 4)


def test_the_flag_that_makes_vllm_read_a_table_is_told() -> None:
    told = backend_hints([W13, FP8_CHANNEL, INT4])
    assert len(told) == 1
    assert "--moe-backend triton" in told[0]
    assert "int4" in told[0]
    assert backend([INT4]) == {"moe_backend": "triton"}
    assert backend([W13, BF16]) == {}


def test_whether_triton_runs_int4_experts_is_what_vllm_says() -> None:
    vllm = pytest.importorskip("vllm.model_executor.layers.fused_moe.oracle.int_wna16")
    from vllm_spark.compat.versions import triton_runs_int4_experts

    if triton_runs_int4_experts():
        assert vllm.map_wna16_backend("triton").value == "TRITON"
        check_version_takes_int4([INT4])
    else:
        with pytest.raises(ValueError, match="not supported"):
            vllm.map_wna16_backend("triton")
        with pytest.raises(ConfigurationError, match="runs int4 experts on Marlin alone"):
            check_version_takes_int4([INT4])
