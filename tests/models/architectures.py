"""The architectures that people serve on a pair, as tiny models that transformers makes.

Each has the structure of its large models (grouped-query or latent attention, experts, Mamba or delta-net layers,
sinks, sliding windows), so that a pair runs the same layers and collectives as for those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.serve.servers import Server
from vllm_spark.models.tiny import VOCABULARY, WEIGHT_SCALE

from . import answers, layouts
from .answers import Answers

CONTEXT = 2048
TIED_SCALE = 0.01

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": WEIGHT_SCALE,
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
SLIDING = {
    "sliding_window": 64,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 256,
    "num_position_embeddings": 64,
}
WITH_PICTURES = {"vocab_size": VOCABULARY + 64}
TWO_TOKENS_AT_LEAST = (2, *answers.PROMPT_LENGTHS[1:])
"""Of prompts for delta nets: a prompt of one token, alone, ends stock vLLM's CPU build."""

STEP = HEADS_OF_32 | EXPERTS | SLIDING | DENSE_FIRST | {"n_routed_experts": 8, "share_expert_dim": 128}
STEP_VISION = {"width": 64, "layers": 2, "heads": 4, "image_size": 56}
BERT = {
    "num_key_value_heads": None,
    "initializer_range": WEIGHT_SCALE,
    "type_vocab_size": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def mrope(*section: int, **more: Any) -> dict[str, Any]:
    """Rotary embeddings with positions in time, height and width."""
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": list(section),
            "mrope_interleaved": True,
            **more,
        }
    }


@dataclass(frozen=True)
class Architecture:
    """How one tiny checkpoint is made, served and asked.

    Attributes:
        model: class of transformers that has the weights; its `config_class` gets `config`.
        config: arguments of the configuration, in addition to `COMMON`; None takes one of those away.
        dtype: of the weights while they are served on a CPU.
        arguments: further ones of `vllm serve`, of the pair and of stock vLLM alike.
        together: whether stock vLLM's CPU build gives the same tokens to prompts that come together.
        cpu_limit: what stock vLLM's CPU build prints when it cannot serve this; empty if it can.
        embedding_scale: standard deviation of the embedding, where it is the output head as well: with `WEIGHT_SCALE`
            the next token would always be the last one.
        outer: arguments of the whole configuration, if it has parts: its text part gets `COMMON` and `config` then.
        vision: whether it has the processor of Qwen3-VL.
        layout: changes what transformers saved into what vLLM reads.
        served: the class that the configuration names for vLLM; empty if it is `model`.
        prompt_lengths: tokens of the prompts.
        ask: the questions.
    """

    model: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    arguments: tuple[str, ...] = ()
    together: bool = True
    cpu_limit: str = ""
    embedding_scale: float = WEIGHT_SCALE
    outer: dict[str, Any] | None = None
    vision: bool = False
    layout: layouts.Layout | None = None
    served: str = ""
    prompt_lengths: answers.Lengths = answers.PROMPT_LENGTHS
    ask: Callable[[Server, answers.Lengths], Answers] = answers.generated

    @property
    def model_class(self) -> str:
        """The class that the checkpoint's configuration names."""
        return self.served or self.model

    @property
    def serve_arguments(self) -> list[str]:
        """Arguments of `vllm serve`, after those of all tests."""
        # A repeated prompt would skip what is cached, and its steps would have other sizes and roundings.
        return ["--dtype", self.dtype, "--no-enable-prefix-caching", *self.arguments]

    @property
    def generates(self) -> bool:
        """Whether it answers with tokens."""
        return self.ask in (answers.generated, answers.about_pictures)


DELTA_NET_WITH_PICTURES: dict[str, Any] = {
    "dtype": "bfloat16",
    "prompt_lengths": TWO_TOKENS_AT_LEAST,
    "together": False,
    "outer": {"vision_config": VISION},
    "vision": True,
    "ask": answers.about_pictures,
}
"""How an `Architecture` with delta nets and a vision tower is made and asked."""

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
    "glm4_moe": Architecture(  # GLM-4.5, 4.6 and 4.7
        "Glm4MoeForCausalLM",
        HEADS_OF_32 | EXPERTS | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "glm4_moe_lite": Architecture(  # GLM-4.7-Flash
        "Glm4MoeLiteForCausalLM",
        EXPERTS | LATENT_ATTENTION | DENSE_FIRST | {"q_lora_rank": 64, "n_group": 1, "topk_group": 1},
        arguments=("--attention-backend", "CPU_MLA"),
        together=False,
    ),
    "minimax_m2": Architecture(
        "MiniMaxM2ForCausalLM",
        # As published: for other sizes, vLLM's kernel that norms queries and keys over two GPUs gives NaN.
        {"num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64}
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128}
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
        arguments=("--attention-backend", "CPU_MLA"),
        together=False,
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3ForCausalLM",
        EXPERTS
        | LATENT_ATTENTION
        | {"q_lora_rank": 64, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        arguments=("--attention-backend", "CPU_MLA"),
        together=False,
    ),
    "deepseek_v4": Architecture(
        "DeepseekV4ForCausalLM",
        EXPERTS
        | {
            "intermediate_size": None,
            "num_key_value_heads": None,
            "n_routed_experts": 8,
            "q_lora_rank": 64,
            "o_lora_rank": 64,
            "o_groups": 4,
            "index_n_heads": 4,
            "sliding_window": 128,
            "num_nextn_predict_layers": 0,
            "layer_types": [
                "sliding_attention",
                "compressed_sparse_attention",
                "heavily_compressed_attention",
                "compressed_sparse_attention",
            ],
            "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        },
        dtype="bfloat16",
        layout=layouts.deepseek_v4,
        cpu_limit="TypeError: 'function' object is not subscriptable",  # a Triton kernel
    ),
    "step3p5": Architecture(
        "Step3p7ForConditionalGeneration",
        STEP,
        outer={"vision_config": STEP_VISION},
        layout=layouts.step3p5,
        cpu_limit='assert self.scoring_func == "softmax"',
        served="Step3p5ForCausalLM",
    ),
    "step3p7": Architecture(
        "Step3p7ForConditionalGeneration",
        STEP,
        outer={"vision_config": STEP_VISION, "image_token_id": VOCABULARY - 1},
        layout=layouts.step3p7,
        cpu_limit="'Step3p7VisionConfig' object has no attribute 'width'",  # transformers 5.19 renames it
    ),
    "mimo_v2": Architecture(
        "MiMoV2FlashForCausalLM",
        HEADS_OF_32 | EXPERTS | SLIDING | DENSE_FIRST | {"v_head_dim": 32, "n_routed_experts": 8},
        layout=layouts.mimo_v2_flash,
    ),
    "mimo_v2_narrow_values": Architecture(  # as published, with values narrower than keys
        "MiMoV2FlashForCausalLM",
        EXPERTS | SLIDING | DENSE_FIRST | {"head_dim": 48, "v_head_dim": 32, "n_routed_experts": 8},
        layout=layouts.mimo_v2_flash,
        cpu_limit="module 'triton' has no attribute 'next_power_of_2'",
    ),
    "nemotron_h": Architecture(
        "NemotronHForCausalLM",
        HEADS_OF_32 | MAMBA | {"layers_block_type": ["mamba", "mlp", "attention", "mlp"]},
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
        prompt_lengths=TWO_TOKENS_AT_LEAST,
        together=False,
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
            "mla_use_nope": True,
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        },
        cpu_limit="No module named 'cutlass'",
    ),
    "qwen3_5": Architecture(
        "Qwen3_5ForConditionalGeneration",
        HEADS_OF_32 | DELTA_NET | WITH_PICTURES | mrope(2, 1, 1, partial_rotary_factor=0.25),
        **DELTA_NET_WITH_PICTURES,
    ),
    "qwen3_5_moe": Architecture(  # Qwen3.5 and Qwen3.6
        "Qwen3_5MoeForConditionalGeneration",
        HEADS_OF_32
        | EXPERTS
        | DELTA_NET
        | WITH_PICTURES
        | mrope(2, 1, 1, partial_rotary_factor=0.25)
        | {"intermediate_size": None, "num_experts": 8, "shared_expert_intermediate_size": 128},
        **DELTA_NET_WITH_PICTURES,
    ),
    "qwen4_exp": Architecture(  # Qwen3.8
        "Qwen4ExpForConditionalGeneration",
        EXPERTS
        | DELTA_NET
        | WITH_PICTURES
        | mrope(24, 20, 20)
        | {
            "intermediate_size": None,
            "head_dim": 128,
            "num_experts": 8,
            "shared_expert_intermediate_size": 128,
            "hc_lowrank": 64,
            "output_gate_type": "silu",
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 128,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        },
        dtype="bfloat16",
        outer={"vision_config": VISION | {"deepstack_visual_indexes": []}},
        cpu_limit="Qwen4Exp QSA requires FlashAttention",
        vision=True,
        ask=answers.about_pictures,
    ),
    "qwen3_vl": Architecture(
        "Qwen3VLForConditionalGeneration",
        HEADS_OF_32 | WITH_PICTURES | mrope(6, 5, 5),
        outer={"vision_config": VISION | {"deepstack_visual_indexes": [0, 1]}},
        vision=True,
        ask=answers.about_pictures,
    ),
    "qwen3_vl_moe": Architecture(
        "Qwen3VLMoeForConditionalGeneration",
        HEADS_OF_32 | EXPERTS | WITH_PICTURES | mrope(6, 5, 5) | {"num_experts": 8, "norm_topk_prob": True},
        outer={"vision_config": VISION | {"deepstack_visual_indexes": [0, 1]}},
        layout=layouts.qwen3_vl_moe,
        vision=True,
        ask=answers.about_pictures,
    ),
    "qwen3_embedding": Architecture(
        "Qwen3ForCausalLM", HEADS_OF_32, arguments=("--runner", "pooling"), ask=answers.embeddings
    ),
    "bert_embedding": Architecture("BertModel", BERT, ask=answers.embeddings),
    "qwen3_reranker": Architecture(
        "Qwen3ForSequenceClassification",
        HEADS_OF_32 | {"num_labels": 1},
        arguments=("--runner", "pooling"),
        ask=answers.scores,
    ),
    "bert_reranker": Architecture("BertForSequenceClassification", BERT | {"num_labels": 1}, ask=answers.scores),
    "qwen2_reward": Architecture(
        "Qwen2ForCausalLM", layout=layouts.qwen2_reward, served="Qwen2ForRewardModel", ask=answers.rewards
    ),
}
