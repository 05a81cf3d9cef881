"""Tiny random checkpoints of the architectures that people serve on a pair, made by transformers from a fixed seed.

Each has the structure of its large models (grouped-query or latent attention, experts, Mamba or delta-net layers,
sinks, sliding windows), so that a pair runs the same layers and collectives as for those.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_spark.models.tiny import make_tokenizer

VOCABULARY = 2048
CONTEXT = 2048
SEED = 20
SCALE = 0.08
"""Standard deviation of the weights: large enough that greedy answers vary, small enough to stay finite."""

TIED_SCALE = 0.01

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": SCALE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS_OF_32 = {"head_dim": 32}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
LATENT_ATTENTION = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
DELTA_NET = {
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
MAMBA = {
    "num_hidden_layers": None,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "chunk_size": 256,
}


@dataclass(frozen=True)
class Architecture:
    """How one tiny checkpoint is made.

    Attributes:
        model: class of transformers that has the weights; its `config_class` gets `config`.
        config: arguments of the configuration, in addition to `COMMON`; None takes one of those away.
        dtype: of the weights while they are served on a CPU; sums of two float32 are the same on both ways.
        cpu_limit: what stock vLLM's CPU build prints when it cannot serve this; empty if it can.
        embedding_scale: standard deviation of the embedding, where it is the output head as well: with `SCALE` the
            next token would always be the last one.
        text_config: the configuration's text part gets `COMMON` and `config`, and the whole one `outer`.
        outer: arguments of the whole configuration, if it has parts.
    """

    model: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    cpu_limit: str = ""
    embedding_scale: float = SCALE
    text_config: bool = False
    outer: dict[str, Any] = field(default_factory=dict)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM", HEADS_OF_32),
    "mistral": Architecture("MistralForCausalLM", HEADS_OF_32 | {"sliding_window": 64}),
    "phi3": Architecture("Phi3ForCausalLM"),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        HEADS_OF_32 | {"sliding_window": 64, "query_pre_attn_scalar": 32},
        embedding_scale=TIED_SCALE,
    ),
    "gemma4": Architecture(
        "Gemma4ForCausalLM",
        HEADS_OF_32
        | {
            "sliding_window": 64,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "global_head_dim": 32,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        },
        embedding_scale=TIED_SCALE,
    ),
    "qwen3_moe": Architecture("Qwen3MoeForCausalLM", HEADS_OF_32 | EXPERTS | {"num_experts": 8}),
    "mixtral": Architecture("MixtralForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "glm4_moe": Architecture(
        "Glm4MoeForCausalLM",
        HEADS_OF_32 | EXPERTS | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "minimax_m2": Architecture(
        "MiniMaxM2ForCausalLM",
        HEADS_OF_32
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128, "rotary_dim": 32}
        | {"scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True},
        cpu_limit='assert self.scoring_func == "softmax"',
    ),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        HEADS_OF_32
        | {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 256,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "deepseek_v2": Architecture(
        "DeepseekV2ForCausalLM",
        EXPERTS | LATENT_ATTENTION | {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
        dtype="bfloat16",
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3ForCausalLM",
        EXPERTS
        | LATENT_ATTENTION
        | {"q_lora_rank": 64, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        dtype="bfloat16",
    ),
    "nemotron_h": Architecture(
        "NemotronHForCausalLM", HEADS_OF_32 | MAMBA | {"layers_block_type": ["mamba", "mlp", "attention", "mlp"]}
    ),
    "nemotron_h_moe": Architecture(
        "NemotronHForCausalLM",
        HEADS_OF_32
        | EXPERTS
        | MAMBA
        | {
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "n_routed_experts": 8,
            "moe_shared_expert_intermediate_size": 128,
        },
        cpu_limit="is_act_and_mul=False is supported only for CUDA",
    ),
    "qwen3_next": Architecture(
        "Qwen3NextForCausalLM",
        HEADS_OF_32 | EXPERTS | DELTA_NET | {"num_experts": 8, "shared_expert_intermediate_size": 128},
        dtype="bfloat16",
    ),
    "kimi_linear": Architecture(
        "KimiLinearForCausalLM",
        EXPERTS
        | LATENT_ATTENTION
        | {
            "first_k_dense_replace": None,
            "n_routed_experts": None,
            "num_local_experts": 8,
            "linear_head_dim": 32,
            "linear_num_heads": 8,
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        },
        cpu_limit="'_lib_fn_wrapper' object has no attribute 'get'",
    ),
    "qwen3_5": Architecture(
        "Qwen3_5ForConditionalGeneration",
        HEADS_OF_32 | DELTA_NET,
        dtype="bfloat16",
        text_config=True,
        outer={
            "vision_config": {
                "depth": 2,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 4,
                "out_hidden_size": 256,
                "num_position_embeddings": 64,
            },
            "image_token_id": VOCABULARY - 1,
            "video_token_id": VOCABULARY - 2,
            "vision_start_token_id": VOCABULARY - 3,
            "vision_end_token_id": VOCABULARY - 4,
        },
    ),
}


def make_checkpoint(folder: Path, name: str) -> Path:
    """Writes the tiny model `name` of `ARCHITECTURES`, in bfloat16, with a tokenizer."""
    import transformers

    architecture = ARCHITECTURES[name]
    folder.mkdir(parents=True)
    arguments = {key: value for key, value in (COMMON | architecture.config).items() if value is not None}
    model_class = getattr(transformers, architecture.model)
    config_class = model_class.config_class
    if architecture.text_config:
        config = config_class(text_config=arguments, **architecture.outer)
    else:
        config = config_class(**arguments)
    torch.manual_seed(SEED)
    model = model_class(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in parameter_name:
                parameter.normal_(std=architecture.embedding_scale if "embed_tokens" in parameter_name else SCALE)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)
    return folder
