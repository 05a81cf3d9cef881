"""Tiny checkpoints beside those of `vllm_spark.models.tiny`, with random weights from a fixed seed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_spark.models import tiny
from vllm_spark.models.tiny import make_tiny_model

from . import vision_files
from .environment import unchanged_environment

OWN_CONFIGURATION = '''
from transformers import Qwen3MoeConfig

class OwnConfig(Qwen3MoeConfig):
    """A configuration class that no other process can import."""

    model_type = "own_moe"
'''


def make_model_with_mtp(folder: Path) -> Path:
    """A MiMo (a Qwen2 with one layer that predicts the token after the next)."""
    make_tiny_model(folder, "dense")
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    hidden, width = tiny.HIDDEN, tiny.INTERMEDIATE
    generator = torch.Generator().manual_seed(5)
    weights = {name: value for name, value in weights.items() if "q_norm" not in name and "k_norm" not in name}
    layers = [f"model.layers.{layer}" for layer in range(tiny.LAYERS)] + ["model.mtp_layers.0"]
    for layer in layers:
        for part, size in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2)):
            weights[f"{layer}.self_attn.{part}_proj.bias"] = torch.zeros(size, dtype=torch.bfloat16)
    mtp = {
        "input_proj": (hidden, 2 * hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    for name, shape in mtp.items():
        value = torch.randn(shape, generator=generator) * tiny.WEIGHT_SCALE
        weights[f"model.mtp_layers.0.{name}.weight"] = value.to(torch.bfloat16)
    norms = ("token_layernorm", "hidden_layernorm", "final_layernorm", "input_layernorm", "post_attention_layernorm")
    for name in norms:
        weights[f"model.mtp_layers.0.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    config |= {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "num_nextn_predict_layers": 1}
    config |= {"auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"}}
    (folder / "configuration_mimo.py").write_text(
        "from transformers import Qwen2Config\n\nclass MiMoConfig(Qwen2Config):\n    model_type = 'mimo'\n"
    )
    _save(folder, weights, config)
    return folder


def make_model_with_own_configuration(folder: Path, model: Path) -> Path:
    """`model` once more, with a configuration class of its own (`--trust-remote-code`)."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_moe", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(OWN_CONFIGURATION)
    return folder


@unchanged_environment()
def make_vision_model(folder: Path) -> Path:
    """A Qwen2-VL of two layers, whose vision tower has two as well."""
    from transformers import (
        AutoTokenizer,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    make_tiny_model(folder, "dense")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = vision_files.add_special_tokens(tokenizer)
    for leftover in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / leftover).unlink()
    torch.manual_seed(11)
    hidden = 128
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": tiny.VOCABULARY + 64,
            "hidden_size": hidden,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": tiny.WEIGHT_SCALE,
            "max_position_embeddings": tiny.CONTEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": hidden,
            "num_heads": 4,
            "mlp_ratio": 2,
            "initializer_range": tiny.WEIGHT_SCALE,
        },
        **special,
    )
    Qwen2VLForConditionalGeneration(config).to(torch.float32).save_pretrained(folder)
    pixels = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}}
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=vision_files.TEMPLATE,
    ).save_pretrained(folder)
    return folder


def _save(folder: Path, weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
