"""A config.json with anything in any place costs a sentence at most, when it is tuned for and when it is served."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spark.errors import ConfigurationError
from vllm_spark.files import configs_folder
from vllm_spark.models.layers import Experts, model_layers
from vllm_spark.models.regroup import layers_as_served, misaligned_groups, regrouped_config
from vllm_spark.models.shard import shard_as_model
from vllm_spark.models.weights import Bf16, Fp8Block, Int4, check_quantization_is_in_config
from vllm_spark.tune.table_shapes import fused_moe_shape, marlin_shapes
from vllm_spark.tune.tuned_model import TunedModel, shapes_of

MODEL = "qwen3-30b-a3b-int4"
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}


def compressed(weights: object) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["a"], "config_groups": groups}


QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:x": {}, "+:.*mlp.*": {"bits": 4}}}
    | {"modules_in_block_to_quantize": [["self_attn.q_proj"]], "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["a"]},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["a"]},
    "int4": compressed(INT4),
    "fp8-compressed": compressed(FP8),
    "auto-round": {"quant_method": "auto-round", "bits": 4, "group_size": 128, "block_name_to_quantize": "model.layers"}
    | {"extra_config": {".*mlp.*": {"bits": 4}}, "to_quant_block_names": ["model.layers"]},
}


def short(name: str) -> dict[str, Any]:
    """A model that comes along, with all that may be in its config.json, and so few layers that many fit a test."""
    content: dict[str, Any] = json.loads((configs_folder() / "models" / name / "config.json").read_text())
    text = content.get("text_config", content)
    text["num_hidden_layers"] = 4
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:4]
    return content | {"mlp_layer_types": None}


CONFIGS = {
    name: short(name) for name in ("qwen3.5-35b-a3b-int4", "glm-4.5-air-int4", "gpt-oss-120b", "minimax-m2-int4", MODEL)
} | {name: short(MODEL) | {"quantization_config": each} for name, each in QUANTIZATIONS.items()}


def places(content: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in content.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from places(value, (*above, key))


def changed(content: dict[str, Any], place: tuple[str, ...], value: object) -> dict[str, Any]:
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return content


def use(config: dict[str, Any]) -> None:
    """All that tuning does with a config.json, and serving."""
    for kernels in ("auto", "triton"):
        shapes_of(TunedModel("any", 2, layers_as_served(config, 2)), kernels)
    for layer in model_layers(config, 1):
        marlin_shapes(layer)
        if isinstance(layer, Experts):
            fused_moe_shape(layer)
    json.dumps(shard_as_model(regrouped_config(config, 2), 2))


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 300), st.sampled_from([10**9, 10**30, 1.5, "", "x", "gptq", "128x128"])
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)),
    max_leaves=4,
)


@pytest.mark.parametrize("name", CONFIGS)
@settings(deadline=None, max_examples=15)
@given(value=ANYTHING)
def test_anything_in_any_place_costs_a_sentence(name: str, value: object) -> None:
    use(CONFIGS[name])
    for place in places(CONFIGS[name]):
        config = changed(CONFIGS[name], place, value)
        misaligned_groups(config, 128, 2, False)  # serving: vLLM is the one to say what is wrong
        with suppress(ConfigurationError):
            use(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 0}, "hidden_size is 0 in config.json; it must be a whole number from 1 to 2147483647"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000 in config.json; it must be a whole number"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3 in config.json; it must be a list"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers is '0'"),
        ({"model_type": "qwen3_next", "full_attention_interval": 0}, "full_attention_interval is 0"),
        ({"quantization_config": {"quant_method": ["gptq"]}}, "['gptq']"),
        ({"quantization_config": QUANTIZATIONS["gptq"] | {"dynamic": ["x"]}}, "dynamic is ['x']"),
        ({"quantization_config": QUANTIZATIONS["gptq"] | {"dynamic": {"+:.*": 4}}}, "+:.* is 4"),
        ({"quantization_config": QUANTIZATIONS["awq"] | {"modules_to_not_convert": 1}}, "modules_to_not_convert is 1"),
        (
            {"quantization_config": QUANTIZATIONS["awq"] | {"modules_to_not_convert": [1]}},
            "modules_to_not_convert is 1",
        ),
        ({"quantization_config": QUANTIZATIONS["auto-round"] | {"extra_config": 7}}, "extra_config is 7"),
        ({"quantization_config": QUANTIZATIONS["auto-round"] | {"block_name_to_quantize": 7}}, "is 7"),
        ({"quantization_config": QUANTIZATIONS["int4"] | {"ignore": "lm_head"}}, "ignore is 'lm_head'"),
        ({"quantization_config": QUANTIZATIONS["int4"] | {"config_groups": [1]}}, "config_groups is [1]"),
        ({"quantization_config": compressed(3)}, "weights is 3"),
    ],
)
def test_the_sentence_has_key_and_value(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        use(short(MODEL) | change)
    assert words in str(caught.value)


@pytest.mark.parametrize("value", [["a", "b"], [128, None], "ab", [0, 0], [-1, -1], [128, 128.5], [128], 128, {}])
@pytest.mark.parametrize("method", ["fp8", "fp8-compressed"])
def test_blocks_are_two_numbers(method: str, value: object) -> None:
    quantization = copy.deepcopy(QUANTIZATIONS[method])
    if method == "fp8":
        key, quantization["weight_block_size"] = "weight_block_size", value
    else:
        key, quantization = "block_structure", compressed(FP8 | {"block_structure": value})
    with pytest.raises(ConfigurationError, match=f"{key} is .*; it must be two numbers from 1 up"):
        model_layers(short(MODEL) | {"quantization_config": quantization}, 1)


def test_what_vllm_takes_is_taken() -> None:
    """Of what looks odd."""

    def weights(quantization: object) -> object:
        (experts,) = (
            layer
            for layer in model_layers(short(MODEL) | {"quantization_config": quantization}, 1)
            if isinstance(layer, Experts)
        )
        return experts.weights

    assert weights(compressed(FP8 | {"block_structure": "64x128"})) == Fp8Block((64, 128))
    assert weights(QUANTIZATIONS["gptq"] | {"dynamic": {"-:.*experts$": None}}) == Bf16()
    assert weights(QUANTIZATIONS["awq"] | {"modules_to_not_convert": None}) == Int4(128, True)
    dense = {"num_experts": 0, "decoder_sparse_step": 0, "num_experts_per_tok": 0}
    assert not any(isinstance(layer, Experts) for layer in model_layers(short(MODEL) | dense, 1))


def test_serving_leaves_a_broken_description_to_vllm() -> None:
    broken = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": 1, "b": {}}}
    for quantization in (broken, {"quant_method": ["gptq"]}, QUANTIZATIONS["gptq"] | {"dynamic": {"a": 3}}):
        config = short("glm-4.5-air-int4") | {"quantization_config": quantization}
        regrouped_config(config, 2)
    assert misaligned_groups({"model_type": ["x"], "intermediate_size": 1408, "mlp_layer_types": 3}, 128, 2, False)


@pytest.mark.parametrize("name", ["quantize_config.json", "hf_quant_config.json"])
def test_quantization_that_is_described_elsewhere(tmp_path: Path, name: str) -> None:
    plain = short(MODEL) | {"quantization_config": None}
    check_quantization_is_in_config(plain, tmp_path)
    check_quantization_is_in_config(plain, tmp_path / ("x" * 300))
    (tmp_path / name).write_text("{}")
    check_quantization_is_in_config(short(MODEL), tmp_path)
    with pytest.raises(ConfigurationError, match=rf"{name} may say how the weights are quantized"):
        check_quantization_is_in_config(plain, tmp_path)


def test_a_config_that_is_nested_too_deeply() -> None:
    """Less deeply than what json refuses to read."""
    depth = 500
    with pytest.raises(ConfigurationError, match="nested too deeply"):
        use(short(MODEL) | {"a": json.loads("[" * depth + "]" * depth)})
