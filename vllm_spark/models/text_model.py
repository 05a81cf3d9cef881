"""Values of a language model's config.json, and one rank's share of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from vllm_spark.errors import ConfigurationError
from vllm_spark.models.config_values import LARGEST, items, section, whole_number

Mixer = Literal["full", "sliding", "latent", "delta", "mamba", "none"]
"""How a layer mixes tokens: attention over all of them, over a window, over latent vectors (MLA), a gated delta net, a
state-space model, or not at all."""

MOST_LAYERS = 10_000
"""Largest number of layers: each is inspected, since a checkpoint may quantize each differently."""

_LATENT = frozenset({"deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite"})
_DELTA = frozenset({"qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"})
_MIMO = frozenset({"mimo_v2", "mimo_v2_flash"})
_BY_WINDOW = frozenset({"llama", "mistral", "qwen2", "qwen3", "qwen3_moe"})
"""Models that may have `sliding_window`, for all layers or for those of `layer_types`."""

_HYBRID_LETTERS: Mapping[str, Mixer] = {"M": "mamba", "*": "full", "-": "none", "E": "none"}
"""The layers of `hybrid_override_pattern`: a layer of such a model is a mixer or an MLP, not both."""


class Heads(NamedTuple):
    """Attention heads of one layer on one rank."""

    queries: int
    keys: int
    """Of keys and of values: at least one, also if there are fewer than ranks."""
    width: int
    """Of a query's and a key's head."""
    value_width: int


class TextModel:
    """The language model of a config.json.

    Args:
        config: the content of config.json; the language model of a multimodal one is taken.
        tp: tensor-parallel size.

    Raises:
        ConfigurationError: the size is not positive.
    """

    def __init__(self, config: Mapping[str, Any], tp: int) -> None:
        if tp < 1:
            raise ConfigurationError(f"the tensor-parallel size is {tp}; it must be 1 or more")
        text = config.get("text_config")
        self.nested = isinstance(text, Mapping)
        self.config: Mapping[str, Any] = text if isinstance(text, Mapping) else config
        self.tp = tp
        self.type = str(self.config.get("model_type") or config.get("model_type") or "")

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return self.number("num_hidden_layers", most=MOST_LAYERS)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; the default if it is missing or null."""
        value = self.config.get(key)
        return default if value is None else value

    def number(self, key: str, *others: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int:
        """The value of the first key that exists."""
        for name in (key, *others):
            if (value := whole_number(self.config, name, least, most)) is not None:
                return value
        if default is None:
            raise ConfigurationError(f"config.json has no {key}, which determines the shapes of its layers")
        return default

    def entry(self, key: str, index: int) -> Any:
        """A layer's entry in a list with one for each layer."""
        entries = items(self.config, key)
        if index >= len(entries):
            raise ConfigurationError(f"{key} in config.json has no entry for layer {index}")
        return entries[index]

    def share(self, what: str, value: int) -> int:
        """This rank's share."""
        if value % self.tp:
            raise ConfigurationError(
                f"{what} is {value}, which {self.tp} ranks cannot divide; choose another tensor-parallel size"
            )
        return value // self.tp

    def heads(self, index: int) -> Heads:
        """The heads of this layer's attention; some models have others in layers with a window."""
        prefix, other = "", self
        if self.mixer(index) == "sliding" and self.type in _MIMO:
            prefix = "swa_"
        if self.mixer(index) == "sliding" and self.get("attention_other_setting"):
            other = TextModel({**self.config, **section(self.config, "attention_other_setting")}, self.tp)
        what, what_of_keys = f"{prefix}num_attention_heads", f"{prefix}num_key_value_heads"
        queries = other.number(what)
        width = other.number(f"{prefix}head_dim", default=max(self.number("hidden_size") // queries, 1))
        keys = other.number(what_of_keys, "num_attention_groups", default=queries)
        values = other.number(f"{prefix}v_head_dim", default=width)
        return Heads(self.share(what, queries), self._share_or_repeat(what_of_keys, keys), width, values)

    def _share_or_repeat(self, what: str, key_heads: int) -> int:
        """Key-value heads of this rank."""
        if key_heads >= self.tp:
            return self.share(what, key_heads)
        if self.tp % key_heads == 0:
            return 1
        raise ConfigurationError(
            f"{what} is {key_heads}, which {self.tp} ranks can neither divide nor repeat; "
            "choose another tensor-parallel size"
        )

    def has_experts(self, index: int) -> bool:
        """Whether this layer has experts, by Qwen's rule."""
        return (
            self.number("num_experts", least=0) > 0
            and (index + 1) % self.number("decoder_sparse_step", default=1) == 0
            and index not in items(self.config, "mlp_only_layers")
        )

    def mixer(self, index: int) -> Mixer:
        """How this layer mixes tokens.

        Raises:
            ConfigurationError: its type is missing, or not supported.
        """
        if self.type in _LATENT:
            return "latent"
        if self.type in _DELTA:
            return "full" if self._is_full_attention(index) else "delta"
        if self.type == "nemotron_h":
            return _HYBRID_LETTERS[self.hybrid_letter(index)]
        if self.type in _MIMO and self.get("hybrid_layer_pattern") is not None:
            return "sliding" if self.entry("hybrid_layer_pattern", index) == 1 else "full"
        if self.type == "gpt_oss" and self.get("layer_types") is None:
            return "full" if index % 2 else "sliding"
        if self.get("layer_types") is not None:
            return "sliding" if self._layer_type(index, "sliding_attention") == "sliding_attention" else "full"
        if self.type in _BY_WINDOW and self.get("sliding_window") and self.get("use_sliding_window", True):
            return "full" if index < self.number("max_window_layers", default=0, least=0) else "sliding"
        return "full"

    def hybrid_letter(self, index: int) -> str:
        """The letter of this layer in `hybrid_override_pattern`: M, *, - or E."""
        pattern = str(self.get("hybrid_override_pattern", ""))
        if index >= len(pattern):
            raise ConfigurationError(f"hybrid_override_pattern in config.json has no entry for layer {index}")
        if pattern[index] not in _HYBRID_LETTERS:
            raise ConfigurationError(f"layer {index} is of type {pattern[index]!r}, which is not supported")
        return pattern[index]

    def _is_full_attention(self, index: int) -> bool:
        """Whether this layer has full attention, in a model that mixes it with linear attention."""
        if self.get("layer_types") is None:
            return (index + 1) % self.number("full_attention_interval", default=4) == 0
        return self._layer_type(index, "linear_attention") == "full_attention"

    def _layer_type(self, index: int, other: str) -> str:
        """`full_attention`, or the other type of this model."""
        found = self.entry("layer_types", index)
        if found not in ("full_attention", other):
            raise ConfigurationError(f"layer {index} is of type {found!r}, which is not supported")
        return str(found)
