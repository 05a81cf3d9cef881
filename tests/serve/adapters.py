"""Random LoRA adapters for the tiny models, strong enough to change what a model says."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_spark.models import tiny

RANK = 8


def make_adapter(folder: Path, seed: int = 0) -> Path:
    """Writes an adapter of the query projections into `folder`; another seed gives other weights."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(tiny.LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(RANK, tiny.HIDDEN, generator=generator)
        weights[f"{name}.lora_B.weight"] = torch.randn(tiny.HEADS * tiny.HEAD_DIM, RANK, generator=generator)
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    config |= {"target_modules": ["q_proj"], "base_model_name_or_path": "spark/tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
