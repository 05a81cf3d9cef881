"""From what transformers saves to the configuration keys and tensor names that vLLM reads, where these differ.

Each function changes the content of `config.json` and the tensors of a checkpoint in place, and has the names of the
published checkpoints of its architecture.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

Config = dict[str, Any]
Weights = dict[str, torch.Tensor]
Layout = Callable[[Config, Weights], None]


def mimo_v2_flash(config: Config, weights: Weights) -> None:
    """MiMo-V2-Flash: two kinds of attention with their own numbers of heads; sinks in the sliding one."""
    sliding = [int(kind == "sliding_attention") for kind in config["layer_types"]]
    layer = sliding.index(1)
    config |= {
        "hybrid_layer_pattern": sliding,
        "moe_layer_freq": [int(kind == "sparse") for kind in config["mlp_layer_types"]],
        "swa_num_attention_heads": config["num_attention_heads"],
        "swa_num_key_value_heads": weights[f"model.layers.{layer}.self_attn.k_proj.weight"].shape[0]
        // config["head_dim"],
        "swa_head_dim": config["head_dim"],
        "swa_v_head_dim": config["v_head_dim"],
        "sliding_window_size": config["sliding_window"],
        "add_swa_attention_sink_bias": True,
        "layernorm_epsilon": config["rms_norm_eps"],
        "rope_theta": 5_000_000.0,
        "swa_rope_theta": 10_000.0,
        "partial_rotary_factor": 0.334,
    }


def step3p7(config: Config, weights: Weights) -> None:
    """Step-3.7: the text model's keys are those of Step-3.5, the vision tower's those of its own code."""
    text, vision = config["text_config"], config["vision_config"]
    _step3p5_keys(text)
    config["vision_config"] = {
        "model_type": "perception_encoder",
        "width": vision["hidden_size"],
        "layers": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "mlp_ratio": vision["mlp_ratio"],
        "ls_init_value": vision["layer_scale_init_value"],
        "hidden_act": vision["hidden_act"],
        "output_dim": None,
        "use_cls_token": False,
        "use_abs_posemb": True,
        "use_rope2d": True,
        "use_ln_pre": True,
        "use_ln_post": False,
    }


def step3p5(config: Config, weights: Weights) -> None:
    """Step-3.5: the text model of Step-3.7 alone."""
    text = config.pop("text_config")
    _step3p5_keys(text)
    config.clear()
    config |= text | {"architectures": ["Step3p5ForCausalLM"], "dtype": "bfloat16"}
    for name in [name for name in weights if name.startswith("vi")]:
        del weights[name]


def _step3p5_keys(text: Config) -> None:
    sparse = [str(layer) for layer, kind in enumerate(text["mlp_layer_types"]) if kind == "sparse"]
    text |= {
        "num_attention_groups": text["num_key_value_heads"],
        "moe_num_experts": text["n_routed_experts"],
        "moe_top_k": text["num_experts_per_tok"],
        "moe_layers_enum": ",".join(sparse),
        "moe_router_activation": "sigmoid",
        "use_moe_router_bias": True,
        "use_head_wise_attn_gate": True,
        "use_moe": True,
        "rope_theta": 10000.0,
    }
    for key in ("rope_parameters", "per_layer_config", "mtp_layer_types", "mtp_mlp_layer_types"):
        text.pop(key, None)


def deepseek_v4(config: Config, weights: Weights) -> None:
    """DeepSeek-V4: names without `model.`, compression ratios by layer, hash routing in the first layers."""
    ratios = config["compress_rates"] | {"sliding_attention": 0}
    config |= {
        "compress_ratios": [ratios[kind] for kind in config["layer_types"]],
        "num_hash_layers": config["mlp_layer_types"].count("hash_moe"),
        "topk_method": "noaux_tc",
        "expert_dtype": "bf16",
    }
    for key in ("rope_parameters", "layer_types", "mlp_layer_types", "compress_rates"):
        config.pop(key)
    new = {
        r"^model\.": "",
        r"^embed_tokens\.": "embed.",
        r"^hc_head\.hc_": "hc_head_",
        r"\.attn\.norm\.": ".attn.kv_norm.",
    }
    for name in list(weights):
        renamed = name
        for pattern, replacement in new.items():
            renamed = re.sub(pattern, replacement, renamed)
        weights[renamed] = weights.pop(name)


def qwen2_reward(config: Config, weights: Weights) -> None:
    """A Qwen2 with a reward head of two layers."""
    hidden = config["hidden_size"]
    generator = torch.Generator().manual_seed(9)
    for name in [name for name in weights if name.startswith("lm_head")]:
        del weights[name]
    for name, shape in {"score.0": (hidden, hidden), "score.2": (1, hidden)}.items():
        weights[f"{name}.weight"] = (torch.randn(shape, generator=generator) * 0.08).to(torch.bfloat16)
        weights[f"{name}.bias"] = torch.zeros(shape[0], dtype=torch.bfloat16)
    config["architectures"] = ["Qwen2ForRewardModel"]


def qwen3_vl_moe(config: Config, weights: Weights) -> None:
    """Qwen3-VL-MoE: the experts' matrices are published as (inputs, outputs)."""
    for name in [name for name in weights if ".experts." in name]:
        weights[name] = weights[name].transpose(1, 2).contiguous()
