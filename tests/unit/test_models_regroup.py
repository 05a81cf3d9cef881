"""Quantization groups that straddle the halves: repeated scales give every weight its value, bit for bit."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_spark.compat.patching import all_patches
from vllm_spark.errors import ConfigurationError
from vllm_spark.files import configs_folder
from vllm_spark.models import regroup
from vllm_spark.models.regroup import apply_regrouping, misaligned_groups, regrouped_config, repeat_scales
from vllm_spark.models.tiny import make_tiny_model

RANKS = 2
PACKED = 8  # weights of 4 bits in an int32

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
AUTO_ROUND: dict[str, Any] = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "packing_format": "auto_round:auto_gptq",
    "extra_config": {"model.layers.0.self_attn.q_proj": {"bits": 16}},
}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128},
        }
    },
}
FORMATS = {"gptq": GPTQ, "awq": AWQ, "auto-round": AUTO_ROUND, "compressed-tensors": COMPRESSED}


def packed(values: torch.Tensor, dimension: int) -> torch.Tensor:
    """4-bit values, eight neighbours along `dimension` in an int32."""
    parts = values.to(torch.int64).unflatten(dimension, (-1, PACKED)).unbind(dimension + 1)
    whole = sum(part << (4 * place) for place, part in enumerate(parts))
    assert isinstance(whole, torch.Tensor)
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)


def unpacked(values: torch.Tensor, dimension: int) -> torch.Tensor:
    """The inverse of `packed`."""
    return torch.stack([(values >> (4 * place)) & 15 for place in range(PACKED)], dimension + 1).flatten(
        dimension, dimension + 1
    )


def checkpoint(method: str, size_k: int, size_n: int, group_size: int) -> dict[str, torch.Tensor]:
    """A random matrix as the format stores it."""
    generator = torch.Generator().manual_seed(size_k)

    def values(*size: int) -> torch.Tensor:
        return torch.randint(16, size, generator=generator)

    scales = torch.rand(size_k // group_size, size_n, generator=generator).bfloat16()
    weights, zeros = values(size_k, size_n), values(size_k // group_size, size_n)
    if method == "compressed-tensors":
        return {
            "down_proj.weight_packed": packed(weights.T, 1),
            "down_proj.weight_scale": scales.T.contiguous(),
            "down_proj.weight_zero_point": packed(zeros.T, 0),
            "down_proj.weight_shape": torch.tensor([size_n, size_k]),
        }
    return {
        "down_proj.qweight": packed(weights, 1 if method == "awq" else 0),
        "down_proj.scales": scales,
        "down_proj.qzeros": packed(zeros, 1),
    }


def part(method: str, tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """A rank's share of a matrix that is divided along its input: as vLLM cuts it."""
    along = 1 if method == "compressed-tensors" else 0
    return {name: tensor if "shape" in name else tensor.chunk(RANKS, along)[rank] for name, tensor in tensors.items()}


def dequantized(method: str, tensors: dict[str, torch.Tensor], group_size: int) -> torch.Tensor:
    """The values that a kernel multiplies with, [size_k, size_n]."""
    if method == "compressed-tensors":
        weights = unpacked(tensors["down_proj.weight_packed"], 1).T
        scales, zeros = tensors["down_proj.weight_scale"].T, unpacked(tensors["down_proj.weight_zero_point"], 0).T
    else:
        weights = unpacked(tensors["down_proj.qweight"], 1 if method == "awq" else 0)
        scales, zeros = tensors["down_proj.scales"], unpacked(tensors["down_proj.qzeros"], 1)
    assert weights.shape[0] == scales.shape[0] * group_size, "a whole number of groups"
    whole = weights.unflatten(0, (-1, group_size))
    values = (whole - zeros[:, None]).bfloat16() * scales[:, None]
    return values.flatten(0, 1)


@pytest.mark.parametrize(("size_k", "group_size"), [(1408, 128), (192, 64), (384, 128)])
@pytest.mark.parametrize("method", FORMATS)
def test_halves_have_the_same_values(method: str, size_k: int, group_size: int) -> None:
    smaller = math.gcd(group_size, size_k // RANKS)
    assert smaller < group_size
    tensors = checkpoint(method, size_k, 64, group_size)
    whole = dequantized(method, tensors, group_size)
    hf_config = SimpleNamespace(spark_repeated_scales=[method, group_size // smaller])
    again = dict(repeat_scales(tensors.items(), hf_config))
    assert again.keys() == tensors.keys()
    halves = [dequantized(method, part(method, again, rank), smaller) for rank in range(RANKS)]
    assert torch.equal(torch.cat(halves).view(torch.int16), whole.view(torch.int16))


def test_other_weights_pass() -> None:
    weights = [("norm.weight", torch.ones(3)), ("down_proj.scales", torch.ones(2, 2)), ("embed.weight", torch.ones(1))]
    untouched = list(repeat_scales(weights, SimpleNamespace()))
    assert all(mine is theirs for mine, theirs in zip(untouched, weights, strict=True))
    changed = dict(repeat_scales(weights, SimpleNamespace(spark_repeated_scales=["gptq", 2])))
    assert changed["norm.weight"] is weights[0][1]
    assert changed["down_proj.scales"].shape == (4, 2)


def test_scales_of_fused_experts_are_refused() -> None:
    weights = [("experts.down_proj.scales", torch.ones(4, 2, 2))]
    with pytest.raises(ConfigurationError, match=r"experts\.down_proj\.scales has 3 dimensions"):
        list(repeat_scales(weights, SimpleNamespace(spark_repeated_scales=["gptq", 2])))


GLM_4_5_AIR = SimpleNamespace(
    hidden_size=4096,
    num_attention_heads=96,
    head_dim=128,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    n_shared_experts=1,
)
QWEN3_30B_A3B = SimpleNamespace(num_attention_heads=32, head_dim=128, intermediate_size=6144, moe_intermediate_size=768)


def names(config: Any, group_size: int, expert_parallel: bool = False) -> set[tuple[str, int, int]]:
    """Of widths that straddle, with size and part, from a config.json or what stands for one."""
    content = config if isinstance(config, dict) else vars(config)
    return {
        (each.name, each.size, each.per_rank) for each in misaligned_groups(content, group_size, RANKS, expert_parallel)
    }


def test_which_widths_straddle() -> None:
    """In a model whose layers are not known here, so that only its numbers speak."""
    shared = ("the width of the shared experts", 1408, 704)
    assert names(GLM_4_5_AIR, 128) == {("moe_intermediate_size", 1408, 704), shared}
    assert names(GLM_4_5_AIR, 128, expert_parallel=True) == {shared}
    assert names(GLM_4_5_AIR, 64) == {("intermediate_size", 10944, 5472)}
    assert names(GLM_4_5_AIR, 32) == set()
    assert misaligned_groups(vars(GLM_4_5_AIR), 128, 1, False) == []
    heads = SimpleNamespace(num_attention_heads=6, head_dim=64, hidden_size=256)
    assert names(heads, 128) == {("the width of the attention heads", 384, 192)}
    heads.v_head_dim = 128
    assert names(heads, 128) == set(), "384 on each rank are three groups"
    assert names(SimpleNamespace(num_attention_heads=6, hidden_size=384), 128) == {
        ("the width of the attention heads", 384, 192)
    }
    assert names(QWEN3_30B_A3B, 128) == set()


@pytest.mark.parametrize(
    ("sparse", "dense"),
    [
        ({"decoder_sparse_step": 1, "mlp_only_layers": []}, {"decoder_sparse_step": 1, "mlp_only_layers": [0]}),
        ({"decoder_sparse_step": 1}, {"decoder_sparse_step": 2}),
        ({"first_k_dense_replace": 0, "moe_layer_freq": 1}, {"first_k_dense_replace": 1, "moe_layer_freq": 1}),
        ({"mlp_layer_types": ["sparse", "sparse"]}, {"mlp_layer_types": ["dense", "sparse"]}),
    ],
)
def test_a_width_of_no_layer_is_none(sparse: dict[str, Any], dense: dict[str, Any]) -> None:
    model = {"model_type": "unheard_of", "intermediate_size": 5472, "moe_intermediate_size": 768}
    assert names(model | sparse, 32) == set()
    assert names(model | dense, 32) == {("intermediate_size", 5472, 2736)}


def test_experts_whose_width_is_called_otherwise() -> None:
    mixtral = {"model_type": "mixtral", "intermediate_size": 1408, "num_local_experts": 8}
    assert names(mixtral, 128) == {("intermediate_size", 1408, 704)}
    assert names(mixtral, 128, expert_parallel=True) == set()
    minimax = shipped("minimax-m2-int4") | {"intermediate_size": 1408}
    assert names(minimax, 128) == {("intermediate_size", 1408, 704)}
    assert names(minimax, 128, expert_parallel=True) == set()
    for config in (mixtral | {"hidden_size": 4096}, minimax):
        slow = vllm_config(SimpleNamespace(**config), GPTQ | {"desc_act": True})
        apply_regrouping(slow, RANKS)
        assert slow.quant_config == "vLLM's", "vLLM has a kernel for these"


def shipped(model: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((configs_folder() / "models" / model / "config.json").read_text())
    return content


def test_only_layers_that_are_there_and_quantized_count() -> None:
    coder = shipped("qwen3-coder-30b-a3b-int4")
    coder["quantization_config"]["group_size"] = 32
    assert (coder["intermediate_size"], names(coder, 32)) == (5472, set()), "no layer has this width"
    assert names(coder | {"mlp_only_layers": [1]}, 32) == {("intermediate_size", 5472, 2736)}

    glm = shipped("glm-4.5-air-int4")
    experts = ("moe_intermediate_size", 1408, 704)
    shared = ("the input width of mlp.shared_experts.down_proj", 1408, 704)
    assert names(glm, 128) == {experts, shared}
    assert names(glm, 128, expert_parallel=True) == {shared}
    glm["quantization_config"]["dynamic"]["-:.*shared_experts.*"] = {}
    assert names(glm, 128) == {experts}
    assert names(glm, 128, expert_parallel=True) == set()

    attention = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "quantization_config": COMPRESSED}
    narrow = shipped("qwen3-32b-int4") | attention
    assert names(narrow, 128) == {("the input width of self_attn.o_proj", 384, 192)}
    alone = COMPRESSED | {"ignore": ["re:.*self_attn.*"]}
    assert names(narrow | {"quantization_config": alone}, 128) == set()


def test_the_language_model_of_another_is_looked_at() -> None:
    """Through vLLM's configuration, where it is an object in an object."""
    outer = SimpleNamespace(model_type="something_with_eyes", quantization_config=copy.deepcopy(GPTQ))
    text = {key: value for key, value in shipped("glm-4.5-air-int4").items() if key != "quantization_config"}
    config = vllm_config(SimpleNamespace(), GPTQ)
    config.model_config = SimpleNamespace(hf_config=outer, hf_text_config=SimpleNamespace(**text), model="served")
    apply_regrouping(config, RANKS)
    assert outer.quantization_config["group_size"] == 64
    assert outer.spark_repeated_scales == ["gptq", 2]


def test_a_config_file_gets_the_groups_of_serving() -> None:
    glm, coder = shipped("glm-4.5-air-int4"), shipped("qwen3-coder-30b-a3b-int4")
    assert regrouped_config(glm, RANKS)["quantization_config"]["group_size"] == 64
    assert regrouped_config(glm, 1) == glm
    coder["quantization_config"]["group_size"] = 32
    assert regrouped_config(coder, RANKS) == coder


def vllm_config(text_config: Any, quantization: dict[str, Any], load_format: str = "auto") -> Any:
    """The part of vLLM's configuration that is looked at."""

    class Config(SimpleNamespace):
        @staticmethod
        def get_quantization_config(model_config: Any, load_config: Any) -> Any:
            return copy.deepcopy(model_config.hf_config.quantization_config)

    hf_config = copy.deepcopy(text_config)
    hf_config.quantization_config = copy.deepcopy(quantization)
    return Config(
        model_config=SimpleNamespace(hf_config=hf_config, hf_text_config=hf_config, model="served"),
        parallel_config=SimpleNamespace(enable_expert_parallel=False),
        load_config=SimpleNamespace(load_format=load_format),
        quant_config="vLLM's",
    )


def with_draft(config: Any, hf_config: Any, model: str = "served", method: str = "mtp") -> Any:
    """The same, with a draft model."""
    draft = SimpleNamespace(hf_config=hf_config, model=model)
    config.speculative_config = SimpleNamespace(method=method, draft_model_config=draft)
    return config


def test_a_draft_of_the_same_weights_is_read_alike() -> None:
    own = SimpleNamespace(quantization_config=copy.deepcopy(GPTQ))
    silent = SimpleNamespace()
    for hf_config in (own, silent):
        apply_regrouping(with_draft(vllm_config(GLM_4_5_AIR, GPTQ), hf_config), RANKS)
        scales = [("model.layers.46.mlp.down_proj.scales", torch.ones(2, 2))]
        assert dict(repeat_scales(scales, hf_config))[scales[0][0]].shape == (4, 2)
    assert own.quantization_config["group_size"] == 64


def test_a_draft_of_other_weights() -> None:
    plain = SimpleNamespace()
    apply_regrouping(with_draft(vllm_config(GLM_4_5_AIR, GPTQ), plain, "head", "eagle3"), RANKS)
    assert not hasattr(plain, "spark_repeated_scales"), "nothing of it is quantized"
    quantized = SimpleNamespace(quantization_config=copy.deepcopy(GPTQ))
    apply_regrouping(with_draft(vllm_config(GLM_4_5_AIR, GPTQ), quantized, "small", "draft_model"), RANKS)
    assert quantized.quantization_config == GPTQ
    config = with_draft(vllm_config(GLM_4_5_AIR, GPTQ), quantized, "head", "eagle3")
    with pytest.raises(ConfigurationError, match=r"the draft model head is quantized.*leave --speculative-config out"):
        apply_regrouping(config, RANKS)
    assert config.model_config.hf_config.quantization_config == GPTQ
    fits = with_draft(vllm_config(QWEN3_30B_A3B, GPTQ), quantized, "head", "eagle3")
    apply_regrouping(fits, RANKS)
    assert quantized.quantization_config == GPTQ


def in_weights(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(values)


@pytest.mark.parametrize(
    ("method", "change", "why"),
    [
        ("gptq", lambda c: c.update(desc_act=True), "desc_act"),
        ("gptq", lambda c: c.update(dynamic={"+:mlp": {"group_size": 64}}), "in different ways"),
        ("auto-round", lambda c: c["extra_config"].update(x={"bits": 4, "group_size": 64}), "in different ways"),
        ("compressed-tensors", in_weights(actorder="group"), "actorder"),
        (
            "compressed-tensors",
            lambda c: c["config_groups"].update(other={"weights": {"strategy": "channel", "group_size": None}}),
            "in different ways",
        ),
    ],
)
def test_what_cannot_be_repeated_is_refused(method: str, change: Callable[[dict[str, Any]], None], why: str) -> None:
    quantization = copy.deepcopy(FORMATS[method])
    change(quantization)
    config = vllm_config(GLM_4_5_AIR, quantization)
    with pytest.raises(ConfigurationError) as refused:
        apply_regrouping(config, RANKS)
    sentence = str(refused.value)
    assert why in sentence
    assert "is 1408, and the 704 of one rank are not a multiple of the quantization group size 128" in sentence
    assert "use a checkpoint with groups of 64, or serve it without --spark" in sentence
    assert config.quant_config == "vLLM's"


def test_parts_that_no_group_size_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = SimpleNamespace(intermediate_size=1440)
    with pytest.raises(ConfigurationError, match="groups of 16 would be aligned, but Marlin has no kernel for them"):
        apply_regrouping(vllm_config(narrow, GPTQ | {"group_size": 32}), RANKS)
    with pytest.raises(ConfigurationError, match="does not work with --load-format tensorizer"):
        apply_regrouping(vllm_config(GLM_4_5_AIR, GPTQ, "tensorizer"), RANKS)
    monkeypatch.setattr(regroup, "state_of", lambda patch: "unknown source")
    with pytest.raises(ConfigurationError, match="does not work with this version of vLLM"):
        apply_regrouping(vllm_config(GLM_4_5_AIR, GPTQ), RANKS)


@pytest.mark.parametrize(
    ("text_config", "quantization"),
    [
        (QWEN3_30B_A3B, GPTQ),
        (GLM_4_5_AIR, GPTQ | {"group_size": 32}),
        (GLM_4_5_AIR, GPTQ | {"group_size": -1}),
        (GLM_4_5_AIR, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        (GLM_4_5_AIR, AUTO_ROUND | {"data_type": "mx_fp"}),
        (GLM_4_5_AIR, COMPRESSED | {"format": "mxfp4-pack-quantized"}),
        (SimpleNamespace(moe_intermediate_size=1408), GPTQ | {"desc_act": True}),
    ],
)
def test_what_fits_stays(text_config: Any, quantization: dict[str, Any]) -> None:
    config = vllm_config(text_config, quantization)
    apply_regrouping(config, RANKS)
    assert config.quant_config == "vLLM's"
    assert config.model_config.hf_config.quantization_config == quantization


@pytest.mark.parametrize("method", FORMATS)
def test_vllm_takes_the_smaller_groups(method: str, tmp_path: Path) -> None:
    """With vLLM's own configuration, which travels to the other rank as a pickle."""
    from vllm.engine.arg_utils import EngineArgs

    make_tiny_model(tmp_path, "dense")
    file = tmp_path / "config.json"
    described = json.loads(file.read_text()) | {"intermediate_size": 384, "quantization_config": FORMATS[method]}
    file.write_text(json.dumps(described))
    config = EngineArgs(model=str(tmp_path), enforce_eager=True).create_engine_config()
    before = pickle.loads(pickle.dumps(config))
    assert sizes(before.quant_config) == {128}
    apply_regrouping(config, RANKS)
    after = pickle.loads(pickle.dumps(config))
    assert sizes(after.quant_config) == {64}
    patch = next(each for each in all_patches() if each.name == "repeated-scales")
    ending = ".weight_scale" if method == "compressed-tensors" else ".scales"
    loaded = patch.replace(lambda loader, model_config, model: [(f"x{ending}", torch.ones(3, 3))])
    assert dict(loaded(None, before.model_config, None))[f"x{ending}"].shape == (3, 3)
    doubled = dict(loaded(None, after.model_config, None))[f"x{ending}"]
    assert doubled.shape == ((3, 6) if method == "compressed-tensors" else (6, 3))


def test_vllms_own_draft_of_the_same_checkpoint(tmp_path: Path) -> None:
    """With vLLM's own configuration: an MTP head in the served model's files, whose configuration is another object."""
    from vllm.engine.arg_utils import EngineArgs

    make_tiny_model(tmp_path, "moe")
    (tmp_path / "config.json").write_text(json.dumps(shipped("glm-4.5-air-int4") | {"num_nextn_predict_layers": 1}))
    drafting = {"method": "mtp", "num_speculative_tokens": 1}
    arguments = EngineArgs(str(tmp_path), enforce_eager=True, max_model_len=256, speculative_config=drafting)
    config = arguments.create_engine_config()
    apply_regrouping(config, RANKS)
    draft = pickle.loads(pickle.dumps(config)).speculative_config.draft_model_config
    assert draft.hf_config.model_type == "glm4_moe_mtp"
    assert sizes(type(config).get_quantization_config(draft, config.load_config)) == sizes(config.quant_config) == {64}
    patch = next(each for each in all_patches() if each.name == "repeated-scales")
    loaded = patch.replace(lambda loader, model_config, model: [("x.scales", torch.ones(3, 3))])
    assert dict(loaded(None, draft, None))["x.scales"].shape == (6, 3)


def sizes(quant_config: Any) -> set[int]:
    """The group sizes of vLLM's quantization configuration."""
    if hasattr(quant_config, "group_size"):
        return {quant_config.group_size}
    return {scheme["weights"].group_size for scheme in quant_config.target_scheme_map.values()}
