"""A tiny checkpoint whose tokenizer has the tags of reasoning and of tool calls."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_spark.models import tiny

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Added tokens; their ids begin at `tiny.VOCABULARY`."""


def make_model_with_tags(folder: Path) -> Path:
    """A tiny Qwen3 with a token and random weights for each tag."""
    from tokenizers import AddedToken, Tokenizer

    tiny.make_tiny_model(folder, "dense")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    assert [tokenizer.token_to_id(tag) for tag in TAGS] == list(range(tiny.VOCABULARY, tiny.VOCABULARY + len(TAGS)))
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(11)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more = torch.randn((len(TAGS), tiny.HIDDEN), generator=generator) * tiny.WEIGHT_SCALE
        weights[name] = torch.cat([weights[name], more.to(weights[name].dtype)])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] += len(TAGS)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
