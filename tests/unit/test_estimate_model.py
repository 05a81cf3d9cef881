"""What a model's config.json says of its bytes: weights by format, KV caches, recurrent states, architectures."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spark.errors import ConfigurationError
from vllm_spark.estimate.model import bytes_of_weight, read_model, stored_as
from vllm_spark.estimate.published import EAGLE3_HEAD
from vllm_spark.estimate.speculation import eagle_head, own_draft_layer
from vllm_spark.models.attention import SequenceMemory, sequence_memory
from vllm_spark.models.config import read_model_config
from vllm_spark.models.layers import Dense, Experts, model_layers
from vllm_spark.models.weights import Bf16, Fp8Block, Fp8Channel, Int4, Int8, Mxfp4, Nvfp4, Weights

DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
}
NEMOTRON_3_SUPER: dict[str, Any] = {
    "model_type": "nemotron_h",
    "hidden_size": 4096,
    "num_hidden_layers": 88,
    "hybrid_override_pattern": "MEMEMEM*E" * 8 + "ME" * 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "moe_intermediate_size": 2688,
    "moe_latent_size": 1024,
    "moe_shared_expert_intermediate_size": 5376,
    "vocab_size": 131072,
}
MIMO_V2_FLASH: dict[str, Any] = {
    "model_type": "mimo_v2_flash",
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 48,
    "hybrid_layer_pattern": [0, *[1, 1, 1, 1, 1, 0] * 7, 1, 1, 1, 1, 0],
    "moe_layer_freq": [0] + [1] * 47,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 192,
    "v_head_dim": 128,
    "swa_num_attention_heads": 64,
    "swa_num_key_value_heads": 8,
    "swa_head_dim": 192,
    "swa_v_head_dim": 128,
    "sliding_window_size": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "vocab_size": 152576,
}
STEP_3_5_FLASH: dict[str, Any] = {
    "model_type": "step3p5",
    "hidden_size": 4096,
    "intermediate_size": 11264,
    "num_hidden_layers": 45,
    "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 12,
    "sliding_window": 512,
    "num_attention_heads": 64,
    "num_attention_groups": 8,
    "head_dim": 128,
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "num_attention_heads": 96,
        "num_attention_groups": 8,
        "head_dim": 128,
    },
    "use_head_wise_attn_gate": True,
    "moe_layers_enum": ",".join(map(str, range(3, 45))),
    "moe_num_experts": 288,
    "moe_top_k": 8,
    "moe_intermediate_size": 1280,
    "share_expert_dim": 1280,
    "vocab_size": 128815,
}


def shipped(name: str) -> dict[str, Any]:
    return read_model_config(name)[1]


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("qwen3-30b-a3b-int4", 30.5),
        ("qwen3-235b-a22b-int4", 235),
        ("qwen3-32b-int4", 32.8),
        ("llama-3.3-70b-int4", 70.6),
        ("glm-4.5-air-int4", 106.9),
        ("minimax-m2-int4", 229),
        ("gpt-oss-120b", 116.8),
        ("qwen3-next-80b-a3b-int4", 79.7),
        ("qwen3.5-122b-a10b-int4", 122),
        (DEEPSEEK_V3, 671),
        (NEMOTRON_3_SUPER, 120.6),
        (MIMO_V2_FLASH, 309),
        (STEP_3_5_FLASH, 196.9),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_has_the_parameters_in_its_name(model: str | dict[str, Any], billions: float) -> None:
    """In bfloat16, without layers that draft and without small vectors, which are less than one in a thousand."""
    config = shipped(model) if isinstance(model, str) else model
    whole = stored_as(read_model({**config, "quantization_config": None}, 1), Bf16())
    assert whole.weight_bytes / 2e9 == pytest.approx(billions, rel=0.004)


def test_a_rank_of_qwen3_235b_takes_what_was_published() -> None:
    """57.64 GiB of weights on each of two machines (conselara.dev/notes/dgx-spark-benchmarks)."""
    half = read_model(shipped("qwen3-235b-a22b-int4"), 2)
    assert half.weight_bytes / 2**30 == pytest.approx(57.64, rel=0.01)


@pytest.mark.parametrize(
    "model", ["qwen3-30b-a3b-int4", "llama-3.3-70b-int4", "qwen3-next-80b-a3b-int4", "qwen3.5-122b-a10b-int4"]
)
def test_two_ranks_halve_every_matrix_but_routers(model: str) -> None:
    whole, half = (read_model(shipped(model), tp) for tp in (1, 2))
    routers = sum(layer.count * whole.router_bytes(layer) for layer in whole.experts)
    # The small projection of linear attention stays whole where Marlin would refuse its half.
    alike = sum(
        layer.count * layer.size_n * layer.size_k * bytes_of_weight(layer.weights, layer.size_k)
        for layer in half.dense
        if layer in tuple(whole.dense)
    )
    assert half.weight_bytes == pytest.approx((whole.weight_bytes + routers + alike) / 2)


@pytest.mark.parametrize(
    ("weights", "of_one"),
    [
        (Bf16(), 2),
        (Fp8Channel(), 1),
        (Fp8Block(), 1 + 4 / 16384),
        (Int8(128), 1 + 2 / 128),
        (Int4(128), 0.5 + 2 / 128),
        (Int4(32, zero_points=True), 0.5 + 2.5 / 32),
        (Int4(-1), 0.5 + 2 / 4096),
        (Mxfp4(), 0.5 + 1 / 32),
        (Nvfp4(), 0.5 + 1 / 16),
    ],
    ids=str,
)
def test_bytes_of_a_weight(weights: Weights, of_one: float) -> None:
    assert bytes_of_weight(weights, 4096) == pytest.approx(of_one)


def test_experts_are_read_with_vllms_padding() -> None:
    """Marlin takes MXFP4 in multiples of 256 of the model's width and 128 of the experts' (2880 and 1440 here)."""
    half = read_model(shipped("gpt-oss-120b"), 2)
    (experts,) = half.experts
    routers = experts.count * half.router_bytes(experts)
    others = sum(layer.count * layer.size_n * layer.size_k * 2 for layer in half.dense)
    both = 2 * 2 * half.own_vocabulary * half.hidden  # embeddings and head
    padded = half.weight_bytes - routers - others - both
    assert padded == pytest.approx(36 * 128 * 3 * 3072 * 1536 * (0.5 + 1 / 32))


def test_a_window_limits_what_is_kept() -> None:
    full, sliding = sorted(sequence_memory(shipped("gpt-oss-120b"), 1), key=lambda each: str(each.mixer))
    assert (full.mixer, full.count, sliding.mixer, sliding.count) == ("full", 18, "sliding", 18)
    assert [full.bytes_of(4096, 2), sliding.bytes_of(4096, 2)] == [4096 * 2 * 8 * 64 * 2, 128 * 2 * 8 * 64 * 2]
    assert sliding.bytes_of(100, 2) == full.bytes_of(100, 2)


ALTERNATING = ["full_attention", "sliding_attention"] * 24


@pytest.mark.parametrize(
    ("change", "mixers"),
    [
        ({}, {"full": 48}),
        ({"sliding_window": 4096}, {"sliding": 48}),
        ({"sliding_window": 4096, "use_sliding_window": False}, {"full": 48}),
        ({"sliding_window": 4096, "max_window_layers": 40}, {"full": 40, "sliding": 8}),
        ({"sliding_window": 64, "layer_types": ALTERNATING}, {"full": 24, "sliding": 24}),
    ],
)
def test_which_layers_have_a_window(change: dict[str, Any], mixers: dict[str, int]) -> None:
    config = {**shipped("qwen3-coder-30b-a3b-int4"), **change}
    assert {each.mixer: each.count for each in sequence_memory(config, 1)} == mixers


def test_layers_with_a_window_may_have_other_heads() -> None:
    full, sliding = sequence_memory(MIMO_V2_FLASH, 2)
    assert (full.mixer, full.count, full.token_values) == ("full", 9, 2 * (192 + 128))
    assert (sliding.mixer, sliding.count, sliding.token_values, sliding.window) == ("sliding", 39, 4 * (192 + 128), 128)

    def sizes(config: dict[str, Any], name: str) -> set[tuple[int, int, int]]:
        dense = (layer for layer in model_layers(config, 2) if isinstance(layer, Dense))
        return {(layer.size_n, layer.size_k, layer.count) for layer in dense if layer.name == f"self_attn.{name}"}

    assert sizes(MIMO_V2_FLASH, "qkv_proj") == {(34 * 192 + 2 * 128, 4096, 9), (36 * 192 + 4 * 128, 4096, 39)}
    assert sizes(MIMO_V2_FLASH, "o_proj") == {(4096, 32 * 128, 48)}
    assert sizes(STEP_3_5_FLASH, "o_proj") == {(4096, 32 * 128, 12), (4096, 48 * 128, 33)}
    assert sizes(STEP_3_5_FLASH, "g_proj") == {(32, 4096, 12), (48, 4096, 33)}


def test_latent_vectors_are_kept_whole_on_each_rank() -> None:
    for tp in (1, 2):
        assert sequence_memory(DEEPSEEK_V3, tp) == [SequenceMemory("latent", 512 + 64, None, 0, 61)]


def test_recurrent_states_do_not_grow_with_the_context() -> None:
    delta, full = sequence_memory(shipped("qwen3-next-80b-a3b-int4"), 2)
    assert (delta.mixer, delta.count, full.mixer, full.count) == ("delta", 36, "full", 12)
    state, convolved = 16 * 128 * 128 * 2, (2 * 8 * 128 + 16 * 128) * 3 * 2
    assert delta.bytes_of(0, 2) == delta.bytes_of(100_000, 2) == state + convolved
    mamba, attention = sequence_memory(NEMOTRON_3_SUPER, 1)
    assert (mamba.mixer, mamba.count, attention.mixer, attention.count) == ("mamba", 40, "full", 8)
    assert mamba.bytes_of(7, 2) == 128 * 64 * 128 * 4 + (128 * 64 + 2 * 8 * 128) * 3 * 2


def test_a_hybrid_model_has_a_mixer_or_an_mlp_in_each_layer() -> None:
    model = read_model(NEMOTRON_3_SUPER, 2)
    assert (model.mixers, model.mlps, model.decoder_layers) == (48, 40, 88)
    (experts,) = model.experts
    assert (experts.hidden, experts.intermediate, experts.gated) == (1024, 1344, False)


def test_latent_attention_reads_its_second_projection_unquantized() -> None:
    quantized = {**DEEPSEEK_V3, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    model = read_model(quantized, 2)
    sizes = {layer.name: layer for layer in model.dense}
    plain = read_model(DEEPSEEK_V3, 2)
    kv_b = sizes["self_attn.kv_b_proj"]
    assert isinstance(kv_b.weights, Fp8Block)
    lost = sum(layer.count * layer.size_n * layer.size_k for layer in model.dense if layer is not kv_b)
    lost += sum(layer.count * layer.experts * 3 * layer.hidden * layer.intermediate for layer in model.experts)
    assert plain.weight_bytes - model.weight_bytes == pytest.approx(lost * (1 - 4 / 16384))


NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.*.self_attn*"]}


def test_nvfp4_of_modelopt_and_of_compressed_tensors() -> None:
    config = shipped("qwen3-coder-30b-a3b-int4")
    by_name = {layer.name: layer.weights for layer in model_layers({**config, "quantization_config": NVFP4}, 1)}
    assert by_name == {
        "self_attn.qkv_proj": Bf16(),
        "self_attn.o_proj": Bf16(),
        "mlp.experts": Nvfp4(),
    }
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}
    compressed = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    layers = model_layers({**config, "quantization_config": compressed}, 1)
    assert {layer.weights for layer in layers} == {Nvfp4()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "glm5_next"}, "model_type 'glm5_next' is not supported; supported are deepseek_v2"),
        ({"quantization_config": {"quant_method": "exl3"}}, "weights quantized by 'exl3' are not supported"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A8"}}, "ModelOpt as W4A8"),
        ({"vocab_size": None}, "config.json has no vocab_size"),
        ({"num_attention_heads": 33}, "num_attention_heads is 33, which 2 ranks cannot divide"),
        ({"model_type": "deepseek_v3"}, "config.json has no kv_lora_rank"),
        ({"model_type": "nemotron_h"}, "hybrid_override_pattern in config.json has no entry for layer 0"),
        ({"layer_types": ["chunked_attention"] * 48}, "layer 0 is of type 'chunked_attention'"),
    ],
)
def test_what_cannot_be_estimated_is_said_in_a_sentence(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_model({**shipped("qwen3-coder-30b-a3b-int4"), **change}, 2)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


LARGE = [DEEPSEEK_V3, NEMOTRON_3_SUPER, MIMO_V2_FLASH, STEP_3_5_FLASH]
KEYS = {key for model in LARGE for key in model} - {"num_hidden_layers"}
JUNK = st.none() | st.booleans() | st.integers(-3, 1 << 40) | st.floats() | st.text(max_size=5) | st.lists(st.none())


@settings(deadline=None)
@given(st.sampled_from(sorted(KEYS)), JUNK, st.sampled_from(LARGE))
def test_any_value_gives_a_model_or_a_sentence(key: str, value: object, config: dict[str, Any]) -> None:
    with suppress(ConfigurationError):
        assert read_model({**config, "num_hidden_layers": 9, key: value}, 2).weight_bytes > 0


def test_an_eagle3_head_has_its_published_size() -> None:
    """0.37 GB in bfloat16, with a vocabulary of its own and the target's embeddings."""
    head = eagle_head(EAGLE3_HEAD, 1)
    assert head.weight_bytes == pytest.approx(0.37e9, rel=0.02)
    assert (head.vocabulary, head.mixers, head.mlps) == (32000, 1, 1)
    with pytest.raises(ConfigurationError, match="draft_vocab_size is 'all'"):
        eagle_head({**EAGLE3_HEAD, "draft_vocab_size": "all"}, 1)


def test_a_models_own_draft_is_one_more_layer_in_bfloat16() -> None:
    config = shipped("glm-4.5-air-int4")
    draft = own_draft_layer(config, 2)
    assert (draft.mixers, draft.mlps, draft.embeddings, draft.vocabulary) == (1, 1, False, 151552)
    assert {type(layer.weights) for layer in draft.layers} == {Bf16}
    assert [layer.name for layer in draft.layers if isinstance(layer, Dense)][-1] == "eh_proj"
    assert any(isinstance(layer, Experts) for layer in draft.layers)
    text = {**shipped("qwen3.5-35b-a3b-int4")["text_config"], "mtp_num_hidden_layers": 1}
    nested = {"model_type": "qwen3_5_moe", "text_config": text}
    assert [each.mixer for each in own_draft_layer(nested, 2).memories] == ["full"]
    with pytest.raises(ConfigurationError, match="no layer that drafts; give another draft with --draft"):
        own_draft_layer(shipped("gpt-oss-120b"), 1)
