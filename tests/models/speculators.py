"""Tiny models that can be guessed, and the heads and drafts that guess them: some of their drafts are accepted.

A random head hardly ever guesses a random model's next token. In the models here each layer adds little to the
embedding, so that the next token depends mostly on the last one, and a draft that looks at the last token alone is
often right, and often wrong.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_spark.models import tiny
from vllm_spark.models.tiny import make_tiny_model, make_tokenizer

from . import checkpoints
from .architectures import ARCHITECTURES, COMMON
from .environment import unchanged_environment
from .random_weights import SEED, make_checkpoint

CALM = 0.005
"""Factor of the weights with which a layer adds to its input."""

SHARPNESS = 2.0
"""Of the EAGLE3 head's queries and keys, so that each position attends to itself."""

MEDUSA_HEADS = 2
MASK_TOKEN = tiny.VOCABULARY - 1
HEAD_VOCABULARY = 1023
"""Tokens that the EAGLE3 head with a vocabulary of its own can draft; odd, so that no two ranks have as many."""

Weights = dict[str, torch.Tensor]


def make_target(folder: Path) -> Path:
    """A tiny Qwen3-MoE that can be guessed."""
    make_tiny_model(folder, "moe")
    return _calmed(folder)


def make_draft_model(folder: Path, target: Path) -> Path:
    """A tiny Qwen3 with the target's tokenizer, embedding and output head."""
    make_tiny_model(folder, "dense", seed=7)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(target / name, folder / name)
    _calmed(folder)
    theirs = load_file(target / "model.safetensors")
    shared = {name: theirs[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(load_file(folder / "model.safetensors") | shared, folder / "model.safetensors")
    return folder


def make_eagle_head(folder: Path, target: Path) -> Path:
    """An EAGLE head of one Llama layer that passes the last token's embedding on; it has its target's output head."""
    folder.mkdir()
    hidden = tiny.HIDDEN
    weights = {f"layers.0.{name}": value for name, value in _llama_layer(hidden, hidden // 2).items()}
    weights["layers.0.post_attention_layernorm.weight"] = torch.ones(hidden)
    weights["fc.weight"] = torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], dim=1)
    weights["embed_tokens.weight"] = _embedding(target)
    return _saved(folder, weights, _llama_config("LlamaForCausalLM"))


def make_eagle3_head(folder: Path, target: Path, vocabulary: int = tiny.VOCABULARY) -> Path:
    """An EAGLE3 head whose attention passes each position's own embedding on.

    Args:
        folder: made.
        target: of `make_target`.
        vocabulary: tokens that it can draft: every second one of the target's if there are fewer than that has.
    """
    folder.mkdir()
    hidden = tiny.HIDDEN
    from_embedding = torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], dim=1)
    weights = {f"midlayer.{name}": value for name, value in _llama_layer(hidden, hidden).items()}
    weights |= {f"midlayer.self_attn.{name}_proj.weight": SHARPNESS * from_embedding for name in "qk"}
    weights |= {
        "midlayer.self_attn.v_proj.weight": from_embedding,
        "midlayer.self_attn.o_proj.weight": torch.eye(hidden),
        "fc.weight": torch.randn(hidden, 3 * hidden, generator=_generator(3)) * 1e-3,
        "embed_tokens.weight": _embedding(target),
    }
    norms = ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm")
    weights |= {f"{name}.weight": torch.ones(hidden) for name in norms}
    head = load_file(target / "model.safetensors")["lm_head.weight"].float()
    if vocabulary < tiny.VOCABULARY:
        draftable = 2 * torch.arange(vocabulary)
        weights["d2t"] = draftable - torch.arange(vocabulary)
        head = head[draftable]
    weights["lm_head.weight"] = head
    config = _llama_config("LlamaForCausalLMEagle3") | {
        "num_key_value_heads": tiny.HEADS,
        "draft_vocab_size": vocabulary,
        # vLLM's own choice names one layer twice in a model of four.
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
    }
    return _saved(folder, weights, config)


@unchanged_environment()
def make_speculators_head(folder: Path, target: Path) -> Path:
    """The EAGLE3 head in the format of the library speculators, whose configuration names its target."""
    from transformers import LlamaConfig

    make_eagle3_head(folder, target)
    head = json.loads((folder / "config.json").read_text())
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": str(target), "architectures": ["Qwen3MoeForCausalLM"]},
        },
        "draft_vocab_size": tiny.VOCABULARY,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": head.pop("eagle_aux_hidden_state_layer_ids"),
        "transformer_layer_config": LlamaConfig(**head).to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_medusa_heads(folder: Path, target: Path) -> Path:
    """Medusa heads that know which token follows which, one and two tokens later."""
    folder.mkdir()
    embedding = _embedding(target)
    output_head = load_file(target / "model.safetensors")["lm_head.weight"].float()
    following = (embedding @ output_head.T).argmax(dim=1)
    normalized = embedding / embedding.norm(dim=1, keepdim=True)
    later, weights = following, {}
    for head in range(MEDUSA_HEADS):
        later = following[later]
        weights[f"lm_heads.{head}.weight"] = torch.zeros_like(embedding).index_add_(0, later, normalized)
        weights[f"blocks.{head}.layers.0.weight"] = torch.zeros(tiny.HIDDEN, tiny.HIDDEN)
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": tiny.HIDDEN,
        "vocab_size": tiny.VOCABULARY,
        "num_heads": MEDUSA_HEADS,
        "num_hidden_layers": 1,
        "max_position_embeddings": tiny.CONTEXT,
    }
    return _saved(folder, weights, config)


def make_dflash_draft(folder: Path, target: Path) -> Path:
    """A DFlash draft of one Qwen3 layer, which drafts all tokens at once; its weights are random."""
    folder.mkdir()
    hidden, head = tiny.HIDDEN, tiny.HEAD_DIM
    weights = {f"layers.0.{name}": value for name, value in _llama_layer(hidden, hidden // 2).items()}
    weights |= {f"layers.0.self_attn.{name}_norm.weight": torch.ones(head) for name in "qk"}
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "hidden_norm", "norm"):
        weights[f"{name}.weight"] = torch.ones(hidden)
    weights["fc.weight"] = torch.randn(hidden, 3 * hidden, generator=_generator(9)) * tiny.WEIGHT_SCALE
    weights["embed_tokens.weight"] = _embedding(target)
    weights["lm_head.weight"] = load_file(target / "model.safetensors")["lm_head.weight"].float()
    config = _llama_config("DFlashDraftModel") | {
        "model_type": "qwen3",
        "draft_vocab_size": tiny.VOCABULARY,
        "dflash_config": {"mask_token_id": MASK_TOKEN, "target_layer_ids": [1, 2, 3]},
    }
    return _saved(folder, weights, config)


def make_mlp_speculator(folder: Path) -> Path:
    """The configuration of an MLP speculator; vLLM looks no further."""
    folder.mkdir()
    config = {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "emb_dim": tiny.HIDDEN,
        "inner_dim": tiny.HIDDEN,
        "n_predict": 2,
        "num_lookahead_tokens": 2,
        "top_k_tokens_per_head": [1, 1],
        "vocab_size": tiny.VOCABULARY,
    }
    return _saved(folder, {"emb.0.weight": torch.zeros(tiny.VOCABULARY, tiny.HIDDEN)}, config)


@dataclass(frozen=True)
class MtpModel:
    """A model with layers in its own checkpoint that predict the token after the next.

    Attributes:
        model_class: the class that its configuration names.
        make: writes the model without those layers.
        layer: the model's layer whose weights they have too.
        prefix: of the names of their decoder layer's weights.
        projection: name of the weight that takes embedding and hidden state.
        embedding_first: whether the embedding is its first half.
        gains: names of their norms.
        gain: value of these; 0 where the norm multiplies by one more than that.
        config: added to the configuration.
        text_config: whether it belongs to the text part.
        dtype: of the weights while they are served.
        drafted: tokens to draft, by so many runs of these layers.
        arguments: further ones of `vllm serve`.
        several_tokens: whether stock vLLM's CPU build ends at a prompt of one token.
        cpu_limits: what stock vLLM's CPU build prints in versions in which it cannot do it, by version.
    """

    model_class: str
    make: Callable[[Path], object]
    layer: str
    prefix: str
    projection: str
    gains: tuple[str, ...]
    config: dict[str, Any]
    embedding_first: bool = True
    gain: float = 1.0
    text_config: bool = False
    dtype: str = "float32"
    drafted: int = 1
    arguments: tuple[str, ...] = ()
    several_tokens: bool = False
    cpu_limits: Mapping[str, str] = field(default_factory=dict)


def _of_architecture(name: str) -> Callable[[Path], Path]:
    return lambda folder: make_checkpoint(folder, ARCHITECTURES[name])


@unchanged_environment()
def _make_ernie(folder: Path) -> None:
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    torch.manual_seed(SEED)
    config = Ernie4_5_MoeConfig(
        **COMMON,
        head_dim=32,
        tie_word_embeddings=False,
        moe_intermediate_size=128,
        moe_k=2,
        moe_num_experts=8,
        moe_num_shared_experts=1,
    )
    model = Ernie4_5_MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.normal_(std=tiny.WEIGHT_SCALE)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)


_NEXT_LAYER = "model.layers.4"
_DEEPSEEK_GAINS = tuple(f"{_NEXT_LAYER}.{name}" for name in ("enorm", "hnorm", "shared_head.norm"))
_QWEN_GAINS = ("mtp.norm", "mtp.pre_fc_norm_hidden", "mtp.pre_fc_norm_embedding")
_MIMO_LAYER = "model.mtp_layers.0"
_NO_PREFIX_CACHE = ("--no-enable-prefix-caching",)
"""With cached prefixes vLLM's CPU build has no kernel for the states of delta nets when it speculates."""

MTP_MODELS = {
    "mimo": MtpModel(
        "MiMoForCausalLM",
        checkpoints.make_model_with_mtp,
        "model.layers.3",
        _MIMO_LAYER,
        f"{_MIMO_LAYER}.input_proj",
        tuple(f"{_MIMO_LAYER}.{name}" for name in ("token_layernorm", "hidden_layernorm", "final_layernorm")),
        {},
        embedding_first=False,
        arguments=("--trust-remote-code",),
    ),
    "glm4_moe": MtpModel(
        "Glm4MoeForCausalLM",
        _of_architecture("glm4_moe"),
        "model.layers.3",
        _NEXT_LAYER,
        f"{_NEXT_LAYER}.eh_proj",
        _DEEPSEEK_GAINS,
        {"num_nextn_predict_layers": 1},
        drafted=3,
    ),
    "ernie4_5_moe": MtpModel(
        "Ernie4_5_MoeForCausalLM",
        _make_ernie,
        "model.layers.0",
        "model.mtp_block.0",
        "model.mtp_linear_proj.0",
        ("model.mtp_emb_norm.0", "model.mtp_hidden_norm.0"),
        {"num_nextn_predict_layers": 1},
    ),
    "deepseek_v3": MtpModel(
        "DeepseekV3ForCausalLM",
        _of_architecture("deepseek_v3"),
        "model.layers.3",
        _NEXT_LAYER,
        f"{_NEXT_LAYER}.eh_proj",
        _DEEPSEEK_GAINS,
        {"num_nextn_predict_layers": 1},
        dtype="bfloat16",
        cpu_limits={"0.26.0": "MLA is not supported on CPU"},
    ),
    "qwen3_next": MtpModel(
        "Qwen3NextForCausalLM",
        _of_architecture("qwen3_next"),
        "model.layers.3",
        "mtp.layers.0",
        "mtp.fc",
        _QWEN_GAINS,
        {"num_nextn_predict_layers": 1},
        gain=0.0,
        arguments=_NO_PREFIX_CACHE,
        dtype="bfloat16",
        cpu_limits={"0.26.0": "must be contiguous at last dimension"},  # its kernel for delta nets, when it is asked
    ),
    "qwen3_5": MtpModel(
        "Qwen3_5ForConditionalGeneration",
        _of_architecture("qwen3_5"),
        "model.language_model.layers.3",
        "mtp.layers.0",
        "mtp.fc",
        _QWEN_GAINS,
        {"mtp_num_hidden_layers": 1},
        gain=0.0,
        arguments=_NO_PREFIX_CACHE,
        text_config=True,
        dtype="bfloat16",
        several_tokens=True,
        cpu_limits={"0.26.0": "Failed to apply Qwen3VLProcessor on data"},
    ),
}


def make_mtp_model(folder: Path, name: str) -> Path:
    """The model `name` of `MTP_MODELS`, with a layer that predicts the token after the next from the next one."""
    model = MTP_MODELS[name]
    model.make(folder)
    _calmed(folder)
    weights = load_file(folder / "model.safetensors")
    layer = f"{model.layer}."
    weights |= {f"{model.prefix}.{key.removeprefix(layer)}": value for key, value in _below(weights, layer).items()}
    hidden = tiny.HIDDEN
    halves = [torch.eye(hidden), torch.zeros(hidden, hidden)]
    weights[f"{model.projection}.weight"] = torch.cat(halves if model.embedding_first else halves[::-1], dim=1)
    weights |= {f"{gain}.weight": torch.full((hidden,), model.gain) for gain in model.gains}
    config = json.loads((folder / "config.json").read_text())
    (config["text_config"] if model.text_config else config).update(model.config)
    return _saved(folder, {key: value.to(torch.bfloat16) for key, value in weights.items()}, config)


def _below(weights: Weights, prefix: str) -> Weights:
    return {name: value.clone() for name, value in weights.items() if name.startswith(prefix)}


def _calmed(folder: Path) -> Path:
    """Scales every weight with which a layer adds to its input."""
    file = folder / "model.safetensors"
    outputs = ("o_proj.weight", "down_proj.weight", "out_proj.weight")
    weights = {name: value * CALM if name.endswith(outputs) else value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def _llama_layer(hidden: int, kv_width: int) -> Weights:
    """Attention and MLP that add little to their input; without norms."""
    generator, width = _generator(3), tiny.INTERMEDIATE
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    weights = {
        f"{name}.weight": torch.randn(shape, generator=generator) * tiny.WEIGHT_SCALE for name, shape in shapes.items()
    }
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        weights[name] *= CALM
    return weights


def _llama_config(architecture: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": "llama",
        "vocab_size": tiny.VOCABULARY,
        "hidden_size": tiny.HIDDEN,
        "intermediate_size": tiny.INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": tiny.HEADS,
        "num_key_value_heads": tiny.KV_HEADS,
        "head_dim": tiny.HEAD_DIM,
        "max_position_embeddings": tiny.CONTEXT,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


def _embedding(target: Path) -> torch.Tensor:
    return load_file(target / "model.safetensors")["model.embed_tokens.weight"].float()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _saved(folder: Path, weights: Weights, config: dict[str, Any]) -> Path:
    contiguous = {name: value.contiguous() for name, value in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
