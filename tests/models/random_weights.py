"""Makes an architecture's checkpoint: random weights from a fixed seed, a tokenizer, and a processor if it sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_spark.models.tiny import WEIGHT_SCALE, make_tokenizer

from .architectures import COMMON, Architecture
from .environment import unchanged_environment
from .vision_files import write_qwen3_vl_processor

SEED = 20
WEIGHTS = "model.safetensors"


@unchanged_environment()
def make_checkpoint(folder: Path, architecture: Architecture) -> Path:
    """Writes a tiny model in bfloat16 into the new folder, and returns that."""
    folder.mkdir(parents=True)
    make_tokenizer(folder)
    special = write_qwen3_vl_processor(folder) if architecture.vision else {}
    _save_random_model(folder, architecture, special)
    if architecture.layout is not None:
        file = folder / "config.json"
        config, weights = json.loads(file.read_text()), load_file(folder / WEIGHTS)
        architecture.layout(config, weights)
        file.write_text(json.dumps(config, indent=2))
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def _save_random_model(folder: Path, architecture: Architecture, special: dict[str, int]) -> None:
    import transformers

    arguments: dict[str, Any] = {
        key: value for key, value in (COMMON | architecture.config).items() if value is not None
    }
    model_class = getattr(transformers, architecture.model)
    if architecture.outer is None:
        config = model_class.config_class(**arguments)
    else:
        config = model_class.config_class(text_config=arguments, **architecture.outer, **special)
    torch.manual_seed(SEED)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.normal_(std=architecture.embedding_scale if "embed_tokens" in name else WEIGHT_SCALE)
    model.to(torch.bfloat16).save_pretrained(folder)
