"""Tiny models with random weights, generated in about a second without a download.

They have the structure of large models (grouped-query attention, a mixture of experts, a chat template), so that a
server runs the same collectives as for those. The text that they generate is random.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch

ModelKind = Literal["moe", "dense"]

VOCABULARY = 2048
HIDDEN = 256
LAYERS = 4
HEADS = 8
KV_HEADS = 4
HEAD_DIM = 32
INTERMEDIATE = 512
EXPERTS = 8
EXPERTS_PER_TOKEN = 2
EXPERT_INTERMEDIATE = 128
CONTEXT = 4096
WEIGHT_SCALE = 0.08
"""Standard deviation of the weights: large enough that greedy answers vary, small enough to stay finite."""

PAD, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{TURN_START}{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{TURN_END}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{TURN_START}assistant\n{{% endif %}}"
)
TOKENIZER_TEXTS = 120
"""Files of the standard library that the tokenizer is trained on: more of them take longer and do not help."""


def make_tiny_model(folder: Path, kind: ModelKind, seed: int = 0) -> Path:
    """Writes a random Qwen3-MoE (`moe`) or Qwen3 (`dense`) with tokenizer and chat template into `folder`.

    About 5 million parameters in bfloat16 (10 MB). The same seed gives the same weights on every machine;
    the tokenizer depends on the Python version, whose standard library it learns from.

    Args:
        folder: made if it is missing; files of an earlier model there are overwritten.
        kind: which architecture.
        seed: any integer; another one gives other weights.

    Returns:
        `folder`, ready for `vllm serve FOLDER`.

    Raises:
        ValueError: `kind` is neither of the two.
    """
    if kind not in get_args(ModelKind):
        raise ValueError(f"there is no tiny model of kind {kind!r}; the kinds are {', '.join(get_args(ModelKind))}")
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    ids = make_tokenizer(folder)
    generator = torch.Generator().manual_seed(seed)
    weights = {name: _random(shape, generator) for name, shape in _shapes(kind)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    stop = {"bos_token_id": None, "eos_token_id": ids[TURN_END], "pad_token_id": ids[PAD]}
    _write_json(folder / "config.json", _config(kind) | stop)
    _write_json(folder / "generation_config.json", stop)
    return folder


def _config(kind: ModelKind) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if kind == "moe" else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if kind == "moe" else "qwen3",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "initializer_range": WEIGHT_SCALE,
    }
    if kind == "moe":
        config |= {
            "num_experts": EXPERTS,
            "num_experts_per_tok": EXPERTS_PER_TOKEN,
            "moe_intermediate_size": EXPERT_INTERMEDIATE,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def _shapes(kind: ModelKind) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order in which the seed fills them."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.self_attn.q_proj.weight", (HEADS * HEAD_DIM, HIDDEN)
        yield f"{prefix}.self_attn.k_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield f"{prefix}.self_attn.v_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield f"{prefix}.self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD_DIM)
        yield f"{prefix}.self_attn.q_norm.weight", (HEAD_DIM,)
        yield f"{prefix}.self_attn.k_norm.weight", (HEAD_DIM,)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
        if kind == "moe":
            yield f"{prefix}.mlp.gate.weight", (EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                yield from _mlp_shapes(f"{prefix}.mlp.experts.{expert}", EXPERT_INTERMEDIATE)
        else:
            yield from _mlp_shapes(f"{prefix}.mlp", INTERMEDIATE)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _mlp_shapes(prefix: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (width, HIDDEN)
    yield f"{prefix}.up_proj.weight", (width, HIDDEN)
    yield f"{prefix}.down_proj.weight", (HIDDEN, width)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    import torch

    if len(shape) == 1:  # a norm's gain
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * WEIGHT_SCALE).to(torch.bfloat16)


def make_tokenizer(folder: Path) -> dict[str, int]:
    """Trains a byte-level BPE tokenizer of `VOCABULARY` tokens with a chat template, and writes it into `folder`.

    Returns:
        The ids of the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": TURN_END,
            "pad_token": PAD,
            "model_max_length": CONTEXT,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return {token: number for number, token in enumerate(SPECIAL_TOKENS)}  # the trainer numbers them first


def _texts() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.glob("*.py"))[:TOKENIZER_TEXTS]:
        yield file.read_text(encoding="utf-8", errors="ignore")


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
