"""Layers of models: their shapes on one rank, how their weights are stored, and sentences for what is not known."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from vllm_spark.errors import ConfigurationError
from vllm_spark.files import configs_folder
from vllm_spark.models.layers import Dense, Experts, Layer, model_layers
from vllm_spark.models.regroup import layers_as_served
from vllm_spark.models.weights import Bf16, Fp8Block, Fp8Channel, Int4, Int8, Mxfp4, Weights
from vllm_spark.tune.table_shapes import fused_moe_shape, marlin_shapes

MODELS = sorted(path.name for path in (configs_folder() / "models").iterdir())


def config_of(model: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((configs_folder() / "models" / model / "config.json").read_text())
    return loaded


def layers_of(model: str, tp: int, quantization: object = ...) -> dict[str, Layer]:
    config = config_of(model)
    if quantization is not ...:
        config["quantization_config"] = quantization
    found = model_layers(config, tp)
    assert len({layer.name for layer in found}) == len(found), "each kind of layer once"
    return {layer.name: layer for layer in found}


def sizes(layer: Layer) -> tuple[int, ...]:
    if isinstance(layer, Dense):
        return layer.size_n, layer.size_k, layer.count
    return layer.experts, layer.top_k, layer.hidden, layer.intermediate, layer.count


EXPECTED: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    # name: on one rank, on each of two
    "qwen3-30b-a3b-int4": {
        "self_attn.qkv_proj": ((5120, 2048, 48), (2560, 2048, 48)),
        "self_attn.o_proj": ((2048, 4096, 48), (2048, 2048, 48)),
        "mlp.experts": ((128, 8, 2048, 768, 48), (128, 8, 2048, 384, 48)),
    },
    "qwen3-coder-30b-a3b-int4": {"mlp.experts": ((128, 8, 2048, 768, 48), (128, 8, 2048, 384, 48))},
    "qwen3-235b-a22b-int4": {"mlp.experts": ((128, 8, 4096, 1536, 94), (128, 8, 4096, 768, 94))},
    "qwen3.5-122b-a10b-int4": {
        "mlp.experts": ((256, 8, 3072, 1024, 48), (256, 8, 3072, 512, 48)),
        "mlp.shared_expert.gate_up_proj": ((2048, 3072, 48), (1024, 3072, 48)),
        "self_attn.qkv_proj": ((17408, 3072, 12), (8704, 3072, 12)),
        # vLLM keeps this one whole on every rank for GPTQ.
        "linear_attn.in_proj_ba": ((128, 3072, 36), (128, 3072, 36)),
    },
    "qwen3.5-35b-a3b-int4": {"mlp.experts": ((256, 8, 2048, 512, 40), (256, 8, 2048, 256, 40))},
    "qwen3-next-80b-a3b-int4": {
        "linear_attn.in_proj_qkvz": ((12288, 2048, 36), (6144, 2048, 36)),
        "linear_attn.in_proj_ba": ((64, 2048, 36), (32, 2048, 36)),
        "linear_attn.out_proj": ((2048, 4096, 36), (2048, 2048, 36)),
        # Queries with their gate, two key and value heads: one for each of two ranks.
        "self_attn.qkv_proj": ((9216, 2048, 12), (4608, 2048, 12)),
        "self_attn.o_proj": ((2048, 4096, 12), (2048, 2048, 12)),
        "mlp.experts": ((512, 10, 2048, 512, 48), (512, 10, 2048, 256, 48)),
        "mlp.shared_expert.gate_up_proj": ((1024, 2048, 48), (512, 2048, 48)),
        "mlp.shared_expert.down_proj": ((2048, 512, 48), (2048, 256, 48)),
    },
    "qwen3-coder-next-int4": {"mlp.experts": ((512, 10, 2048, 512, 48), (512, 10, 2048, 256, 48))},
    "glm-4.5-air-int4": {
        "mlp.gate_up_proj": ((21888, 4096, 1), (10944, 4096, 1)),
        "mlp.experts": ((128, 8, 4096, 1408, 45), (128, 8, 4096, 704, 45)),
        "mlp.shared_experts.down_proj": ((4096, 1408, 45), (4096, 704, 45)),
    },
    "minimax-m2-int4": {"block_sparse_moe.experts": ((256, 8, 3072, 1536, 62), (256, 8, 3072, 768, 62))},
    "gpt-oss-120b": {
        "attn.qkv_proj": ((5120, 2880, 36), (2560, 2880, 36)),
        "mlp.experts": ((128, 4, 2880, 2880, 36), (128, 4, 2880, 1440, 36)),
    },
    "qwen3-32b-int4": {
        "mlp.gate_up_proj": ((51200, 5120, 64), (25600, 5120, 64)),
        "mlp.down_proj": ((5120, 25600, 64), (5120, 12800, 64)),
    },
    "llama-3.3-70b-int4": {"mlp.down_proj": ((8192, 28672, 80), (8192, 14336, 80))},
}


def test_every_model_that_comes_along_is_expected() -> None:
    assert sorted(EXPECTED) == MODELS


@pytest.mark.parametrize("model", sorted(EXPECTED))
def test_shapes_of_one_rank(model: str) -> None:
    for place, tp in enumerate((1, 2)):
        layers = layers_of(model, tp)
        for name, expected in EXPECTED[model].items():
            assert sizes(layers[name]) == expected[place], f"{name} at TP={tp}"


def test_few_key_heads_are_repeated() -> None:
    """4 of them among 8 ranks: each has one."""
    layer = layers_of("qwen3-30b-a3b-int4", 8)["self_attn.qkv_proj"]
    assert sizes(layer)[0] == (32 // 8 + 2) * 128


def test_a_group_that_a_shard_cuts_in_two() -> None:
    """Width 704 in groups of 128 is served in groups of 64, and needs no padding then."""
    layers = {layer.name: layer for layer in layers_as_served(config_of("glm-4.5-air-int4"), 2)}
    assert [(s.kernel, s.size_n, s.size_k, s.group_size) for s in marlin_shapes(layers["mlp.experts"])] == [
        ("moe_w13", 1408, 4096, 64),
        ("moe_w2", 4096, 704, 64),
    ]


def test_the_shards_that_vllm_pads() -> None:
    """What the kernels see: 32 columns become 64, MXFP4 its own multiples."""
    small = marlin_shapes(layers_of("qwen3-next-80b-a3b-int4", 2)["linear_attn.in_proj_ba"])
    assert [(s.size_n, s.size_k) for s in small] == [(64, 2048)]
    oss = marlin_shapes(layers_of("gpt-oss-120b", 2)["mlp.experts"])
    assert [(s.size_n, s.size_k, s.group_size, s.quant_type) for s in oss] == [
        (3072, 3072, 32, "float4_e2m1f"),
        (3072, 1536, 32, "float4_e2m1f"),
    ]
    assert marlin_shapes(layers_of("gpt-oss-120b", 2)["attn.qkv_proj"]) == []


def test_names_of_fused_moe_tables() -> None:
    def name(model: str, tp: int, quantization: object) -> str | None:
        (experts,) = [x for x in layers_of(model, tp, quantization).values() if isinstance(x, Experts)]
        shape = fused_moe_shape(experts)
        return None if shape is None else shape.file_name("NVIDIA_GB10")

    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert (
        name("qwen3-30b-a3b-int4", 2, block)
        == "E=128,N=384,device_name=NVIDIA_GB10,dtype=fp8_w8a8,block_shape=[128,128].json"
    )
    assert name("glm-4.5-air-int4", 2, {"quant_method": "fp8"}) == (
        "E=128,N=704,device_name=NVIDIA_GB10,dtype=fp8_w8a8.json"
    )
    assert name("qwen3-30b-a3b-int4", 1, None) == "E=128,N=768,device_name=NVIDIA_GB10.json"
    assert name("gpt-oss-120b", 1, {"quant_method": "mxfp4"}) is None


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
NEXT = "qwen3-next-80b-a3b-int4"
CT_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


def compressed(weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        **more,
    }


@pytest.mark.parametrize(
    ("quantization", "name", "weights"),
    [
        (None, "mlp.experts", Bf16()),
        (GPTQ, "mlp.experts", Int4(128)),
        (GPTQ | {"bits": 8, "group_size": -1}, "mlp.experts", Int8(-1)),
        (GPTQ | {"dynamic": {r"-:.*attn.*": {}}}, "linear_attn.in_proj_qkvz", Bf16()),
        (GPTQ | {"dynamic": {r"-:.*attn.*": {}}}, "mlp.experts", Int4(128)),
        (GPTQ | {"dynamic": {r"+:.*experts$": {"group_size": 32}}}, "mlp.experts", Int4(32)),
        (GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"]]}, "self_attn.o_proj", Bf16()),
        (GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"]]}, "self_attn.qkv_proj", Int4(128)),
        (GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"]]}, "mlp.experts", Int4(128)),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, "mlp.experts", Int4(64, True)),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 64, "modules_to_not_convert": ["linear_attn"]},
            "linear_attn.out_proj",
            Bf16(),
        ),
        (compressed(CT_WEIGHTS), "mlp.experts", Int4(32)),
        (compressed(CT_WEIGHTS | {"symmetric": False}), "mlp.experts", Int4(32, True)),
        (compressed(CT_WEIGHTS, ignore=[r"re:.*linear_attn.*"]), "linear_attn.in_proj_ba", Bf16()),
        (compressed(CT_WEIGHTS, ignore=[r"re:.*self_attn\.[qkv]_proj$"]), "self_attn.qkv_proj", Bf16()),
        (compressed(CT_WEIGHTS, ignore=[r"re:.*self_attn\.[qkv]_proj$"]), "self_attn.o_proj", Int4(32)),
        (compressed({"num_bits": 8, "type": "float", "strategy": "channel"}), "mlp.experts", Fp8Channel()),
        (
            compressed({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}),
            "mlp.experts",
            Fp8Block((128, 128)),
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "mlp.experts", Fp8Block((128, 128))),
        ({"quant_method": "fp8"}, "self_attn.o_proj", Fp8Channel()),
        ({"quant_method": "mxfp4"}, "mlp.experts", Mxfp4()),
        ({"quant_method": "mxfp4"}, "self_attn.o_proj", Bf16()),
        (
            {"quant_method": "auto-round", "bits": 4, "group_size": 128, "extra_config": {r".*attn.*": {"bits": 16}}},
            "self_attn.qkv_proj",
            Bf16(),
        ),
        (
            {"quant_method": "inc", "bits": 4, "group_size": 128, "extra_config": {r".*attn.*": {"bits": 16}}},
            "mlp.experts",
            Int4(128),
        ),
        (
            {"quant_method": "auto-round", "bits": 4, "group_size": 128, "block_name_to_quantize": "model.blocks"},
            "mlp.experts",
            Bf16(),
        ),
    ],
)
def test_how_weights_are_stored(quantization: object, name: str, weights: Weights) -> None:
    assert layers_of(NEXT, 1, quantization)[name].weights == weights


def test_layers_left_alone_by_their_number_are_counted_apart() -> None:
    """A checkpoint whose first layer alone is not quantized."""
    config = config_of("qwen3-32b-int4")
    config["quantization_config"] = {
        "quant_method": "fp8",
        "modules_to_not_convert": [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"],
    }
    found = [layer for layer in model_layers(config, 1) if layer.name.startswith("self_attn")]
    assert [(layer.count, layer.weights) for layer in found] == [
        (1, Bf16()),
        (1, Bf16()),
        (63, Fp8Channel()),
        (63, Fp8Channel()),
    ]


def test_a_nested_model_is_named_in_more_than_one_way() -> None:
    """The checkpoint says `model.language_model.layers`, vLLM `language_model.model.layers`."""
    config = config_of("qwen3.5-35b-a3b-int4")
    for spelling in ("model.language_model.layers", "language_model.model.layers"):
        config["quantization_config"] = {"quant_method": "fp8", "modules_to_not_convert": [f"{spelling}.3.mlp.experts"]}
        counts = {x.weights: x.count for x in model_layers(config, 1) if isinstance(x, Experts)}
        assert counts == {Bf16(): 1, Fp8Channel(): 39}


@pytest.mark.parametrize(
    ("change", "tp", "words"),
    [
        ({"model_type": "mamba"}, 1, "'mamba'"),
        ({"model_type": None}, 1, "model_type"),
        ({"hidden_size": None}, 1, "no hidden_size"),
        ({"hidden_size": "2048"}, 1, "hidden_size is '2048'"),
        ({"num_attention_heads": 30}, 4, "num_attention_heads is 30, which 4 ranks"),
        ({"num_key_value_heads": 3}, 2, "num_key_value_heads is 3"),
        ({"moe_intermediate_size": 767}, 2, "moe_intermediate_size is 767"),
        ({"num_experts_per_tok": 200}, 1, "200 of 128 experts"),
        ({}, 0, "tensor-parallel size is 0"),
        ({"quantization_config": {"quant_method": "bitnet"}}, 1, "'bitnet'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, 1, "3 bits"),
        ({"quantization_config": {"quant_method": "gptq"}}, 1, "bits of gptq is None"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, 1, "weight_block_size is 128"),
        ({"quantization_config": GPTQ | {"dynamic": {"-:(": {}}}}, 1, "'('"),
        ({"quantization_config": GPTQ | {"group_size": "128"}}, 1, "group_size is '128'"),
        ({"quantization_config": compressed({"num_bits": 4, "type": "float"})}, 1, "4 bits of type 'float'"),
        ({"quantization_config": [1]}, 1, "[1]"),
    ],
)
def test_one_sentence_for_what_is_not_known(change: dict[str, Any], tp: int, words: str) -> None:
    config = copy.deepcopy(config_of("qwen3-30b-a3b-int4")) | change
    with pytest.raises(ConfigurationError) as caught:
        model_layers(config, tp)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_model_says_where_its_numbers_came_from() -> None:
    for model in MODELS:
        file = configs_folder() / "models" / model / "provenance.json"
        content = json.loads(file.read_text())
        assert set(content) == {"sources", "unverified"}, model
        assert {"architecture", "quantization"} <= set(content["sources"]), model
