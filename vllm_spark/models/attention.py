"""What the layers of a model keep of each sequence on one rank: a KV cache, latent vectors, or a recurrent state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_spark.models.text_model import Mixer, TextModel


@dataclass(frozen=True)
class SequenceMemory:
    """What a layer keeps of one sequence.

    Attributes:
        mixer: how the layer mixes tokens; never `none`.
        token_values: numbers kept for each token, in the type of the KV cache.
        window: tokens that are kept; None: all.
        state_bytes: of a recurrent state, which a step reads and writes whole.
        count: layers of the model that are like this.
    """

    mixer: Mixer
    token_values: int
    window: int | None
    state_bytes: int
    count: int

    def tokens(self, context: int) -> int:
        """Tokens that are kept of a sequence of `context` tokens."""
        return context if self.window is None else min(context, self.window)

    def bytes_of(self, context: int, value_bytes: float) -> float:
        """Bytes of one layer for one sequence; `value_bytes` are those of a number in the KV cache."""
        return self.tokens(context) * self.token_values * value_bytes + self.state_bytes


def sequence_memory(config: Mapping[str, Any], tp: int) -> list[SequenceMemory]:
    """What one of `tp` ranks keeps of a sequence, by kinds of layers.

    Raises:
        ConfigurationError: a value is missing or cannot be divided among the ranks, or a layer's type is not supported.
    """
    model = TextModel(config, tp)
    found: Counter[SequenceMemory] = Counter()
    for index in range(model.layers):
        if (mixer := model.mixer(index)) != "none":
            found[_kept(model, mixer, index)] += 1
    return [replace(each, count=count) for each, count in found.items()]


def _kept(model: TextModel, mixer: Mixer, index: int) -> SequenceMemory:
    if mixer == "latent":  # not divided: each rank has the latent vectors of all heads
        return SequenceMemory(mixer, model.number("kv_lora_rank") + model.number("qk_rope_head_dim"), None, 0, 0)
    if mixer == "delta":
        key, value = model.number("linear_key_head_dim"), model.number("linear_value_head_dim")
        keys = model.share("linear_num_key_heads", model.number("linear_num_key_heads"))
        values = model.share("linear_num_value_heads", model.number("linear_num_value_heads"))
        convolved = 2 * keys * key + values * value
        return SequenceMemory(mixer, 0, None, _state_bytes(model, values * key * value, convolved), 0)
    if mixer == "mamba":
        heads = model.share("mamba_num_heads", model.number("mamba_num_heads"))
        inner, size = heads * model.number("mamba_head_dim"), model.number("ssm_state_size")
        convolved = inner + 2 * model.share("n_groups", model.number("n_groups")) * size
        return SequenceMemory(mixer, 0, None, _state_bytes(model, inner * size, convolved), 0)
    window = model.number("sliding_window", "sliding_window_size") if mixer == "sliding" else None
    own = model.heads(index)
    return SequenceMemory(mixer, own.keys * (own.width + own.value_width), window, 0, 0)


def _state_bytes(model: TextModel, state: int, convolved: int) -> int:
    """Bytes of a state, and of the inputs of its convolution that are kept, which are bfloat16."""
    kernel = model.number("linear_conv_kernel_dim", "conv_kernel", default=4)
    wide = model.get("mamba_ssm_dtype", _STATE_TYPES.get(model.type, "bfloat16")) == "float32"
    return state * (4 if wide else 2) + convolved * (kernel - 1) * 2


_STATE_TYPES: Mapping[str, str] = dict.fromkeys(
    ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "nemotron_h"), "float32"
)
"""Types of recurrent states where config.json has no `mamba_ssm_dtype`: transformers' defaults for these models."""
