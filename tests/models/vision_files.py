"""Tokenizer and processor of the Qwen vision-language models, for pictures of few patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}assistant: "
)
SPECIAL = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


def write_qwen3_vl_processor(folder: Path, patch: int = 16) -> dict[str, int]:
    """Adds the special tokens to the tokenizer in `folder`, and writes a Qwen3-VL processor beside it.

    Args:
        folder: has a tokenizer.
        patch: pixels of a patch's side.

    Returns:
        The keys of the model's configuration with the ids of the special tokens.
    """
    from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = add_special_tokens(tokenizer)
    pixels = {"size": {"shortest_edge": (2 * patch) ** 2, "longest_edge": (4 * patch) ** 2}, "patch_size": patch}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**pixels),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return special


def add_special_tokens(tokenizer: Any) -> dict[str, int]:
    """Adds the tokens around and for pictures, and returns the keys of a model's configuration with their ids."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL.values())})
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in SPECIAL.items()}
