"""The linear layers and experts of a model, with the shapes that one rank multiplies, from its config.json.

Shards as vLLM 0.33 makes them (`vllm/model_executor/models/`): query heads, intermediate widths and the heads of linear
attention are divided by the tensor-parallel size; key and value heads are too, and repeated where there are fewer of
them than ranks. Routers, embeddings, the output head, vision towers and draft layers are left out: their kernels have
no tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_spark.errors import ConfigurationError
from vllm_spark.models.config_values import LARGEST, items, whole_number
from vllm_spark.models.weights import LayerName, Reader, Weights, weights_reader


@dataclass(frozen=True)
class Dense:
    """A linear layer of one rank.

    Attributes:
        name: in the decoder layer, as vLLM calls it: `self_attn.qkv_proj`.
        size_n: output width of this rank.
        size_k: input width of this rank.
        count: layers of the model that are like this.
        weights: how they are stored.
    """

    name: str
    size_n: int
    size_k: int
    count: int
    weights: Weights


@dataclass(frozen=True)
class Experts:
    """A block of routed experts of one rank.

    Attributes:
        name: in the decoder layer, as vLLM calls it: `mlp.experts`.
        experts: of this rank (all: they are divided in width).
        top_k: experts that a token goes to.
        hidden: width of the model.
        intermediate: an expert's inner width on this rank, before any padding.
        count: layers of the model that are like this.
        weights: how they are stored.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    count: int
    weights: Weights


Layer = Dense | Experts


def model_layers(config: Mapping[str, Any], tp: int) -> list[Layer]:
    """The layers that one of `tp` ranks multiplies in a forward pass, with a count for equal ones.

    Args:
        config: the content of config.json; the language model of a multimodal one is taken.
        tp: tensor-parallel size.

    Raises:
        ConfigurationError: the model or its quantization is not supported; a value is missing or cannot be divided
            among the ranks.
    """
    if tp < 1:
        raise ConfigurationError(f"the tensor-parallel size is {tp}; it must be 1 or more")
    text = config.get("text_config")
    nested = isinstance(text, Mapping)
    model = _Model(text if isinstance(text, Mapping) else config, tp)
    kind = model.kind(str(config.get("model_type") or ""))
    read, method = weights_reader(config)
    found: Counter[Layer] = Counter()
    for index in range(model.number("num_hidden_layers", most=_MOST_LAYERS)):
        for layer, parts in kind(model, index, method):
            found[_stored(layer, index, parts, read, nested)] += 1
    return [replace(layer, count=count) for layer, count in found.items()]


_MOST_LAYERS = 10_000
"""Largest number of layers: each is inspected, since a checkpoint may quantize each differently."""

_Parts = tuple[str, ...]
_QKV: _Parts = ("q_proj", "k_proj", "v_proj")
_GATE_UP: _Parts = ("gate_proj", "up_proj")
_NONE: _Parts = ()


def _stored(layer: Layer, index: int, parts: _Parts, read: Reader, nested: bool) -> Layer:
    """The layer with its weights, found by its name in the checkpoint."""
    roots = ["model.layers"]
    if nested:
        roots += ["model.language_model.layers", "language_model.model.layers"]
    fused = tuple(f"{root}.{index}.{layer.name}" for root in roots)
    if isinstance(layer, Experts):
        names = tuple(tuple(f"{name}.0.{part}" for part in (*_GATE_UP, "down_proj")) for name in fused)
    else:
        names = tuple(tuple(f"{name.rpartition('.')[0]}.{p}" for p in parts) or (name,) for name in fused)
    return replace(layer, weights=read(LayerName(fused, names, isinstance(layer, Experts))))


_Found = Iterator[tuple[Layer, _Parts]]
_Kind = Callable[["_Model", int, "str | None"], _Found]


class _Model:
    """Values of a config.json, and one rank's share of them."""

    def __init__(self, config: Mapping[str, Any], tp: int) -> None:
        self._config = config
        self.tp = tp

    def kind(self, outer: str) -> _Kind:
        """The function that yields the layers of this type of model."""
        name = str(self._config.get("model_type") or outer)
        if name in _KINDS:
            return _KINDS[name]
        raise ConfigurationError(
            f"model_type {name or 'nothing'!r} is not supported; supported are {', '.join(sorted(_KINDS))}"
        )

    def get(self, key: str, default: Any = None) -> Any:
        value = self._config.get(key)
        return default if value is None else value

    def number(self, key: str, *others: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int:
        """The value of the first key that exists."""
        for name in (key, *others):
            if (value := whole_number(self._config, name, least, most)) is not None:
                return value
        if default is None:
            raise ConfigurationError(f"config.json has no {key}, which determines the shapes of its layers")
        return default

    def share(self, what: str, value: int) -> int:
        """This rank's share."""
        if value % self.tp:
            raise ConfigurationError(
                f"{what} is {value}, which {self.tp} ranks cannot divide; choose another tensor-parallel size"
            )
        return value // self.tp

    def attention(self, name: str = "self_attn", gate: bool = False) -> _Found:
        """Fused query, key and value, and the output projection; a gate doubles the queries."""
        hidden, heads = self.number("hidden_size"), self.number("num_attention_heads")
        key_heads = self.number("num_key_value_heads", default=heads)
        head = self.number("head_dim", default=max(hidden // heads, 1))
        own = self.share("num_attention_heads", heads)
        if key_heads >= self.tp:
            own_keys = self.share("num_key_value_heads", key_heads)
        elif self.tp % key_heads == 0:
            own_keys = 1
        else:
            raise ConfigurationError(
                f"num_key_value_heads is {key_heads}, which {self.tp} ranks can neither divide nor repeat; "
                "choose another tensor-parallel size"
            )
        queries = own * (2 if gate else 1)
        yield _dense(f"{name}.qkv_proj", (queries + 2 * own_keys) * head, hidden), _QKV
        yield _dense(f"{name}.o_proj", hidden, own * head), _NONE

    def linear_attention(self, interleaved: bool, method: str | None) -> _Found:
        """A gated delta net: fused query, key, value and gate, two small projections, and the output projection."""
        hidden = self.number("hidden_size")
        key_heads, value_heads = self.number("linear_num_key_heads"), self.number("linear_num_value_heads")
        self.share("linear_num_key_heads", key_heads)
        own_values = self.share("linear_num_value_heads", value_heads)
        keys = key_heads * self.number("linear_key_head_dim") // self.tp
        values = own_values * self.number("linear_value_head_dim")
        # vLLM repeats the small projection on every rank where Marlin would refuse its shard (vllm issue 35924).
        whole = not interleaved and method in ("gptq", "awq", "auto-round", "intel/auto-round", "inc")
        small = 2 * (value_heads if whole else own_values)
        qkvz, ba = (_NONE, _NONE) if interleaved else (("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"))
        yield _dense("linear_attn.in_proj_qkvz", 2 * keys + 2 * values, hidden), qkvz
        yield _dense("linear_attn.in_proj_ba", small, hidden), ba
        yield _dense("linear_attn.out_proj", hidden, values), _NONE

    def mlp(self, name: str, what: str, intermediate: int) -> _Found:
        """Fused gate and up, and down."""
        hidden, own = self.number("hidden_size"), self.share(what, intermediate)
        yield _dense(f"{name}.gate_up_proj", 2 * own, hidden), _GATE_UP
        yield _dense(f"{name}.down_proj", hidden, own), _NONE

    def experts(self, name: str, experts: int, what: str, intermediate: int) -> _Found:
        """Routed experts, each sharded along its width."""
        top_k = self.number("num_experts_per_tok", "experts_per_token")
        if not 0 < top_k <= experts:
            raise ConfigurationError(f"num_experts_per_tok is {top_k} of {experts} experts in config.json")
        own = self.share(what, intermediate)
        yield Experts(name, experts, top_k, self.number("hidden_size"), own, 0, _UNREAD), _NONE

    def has_experts(self, index: int) -> bool:
        """Whether this layer has experts, by Qwen's rule."""
        return (
            self.number("num_experts", least=0) > 0
            and (index + 1) % self.number("decoder_sparse_step", default=1) == 0
            and index not in items(self._config, "mlp_only_layers")
        )

    def is_full_attention(self, index: int) -> bool:
        """Whether this layer has full attention, in a model that mixes it with linear attention."""
        if self.get("layer_types") is None:
            return (index + 1) % self.number("full_attention_interval", default=4) == 0
        types = items(self._config, "layer_types")
        if index >= len(types):
            raise ConfigurationError(f"layer_types in config.json has no entry for layer {index}")
        if types[index] not in ("full_attention", "linear_attention"):
            raise ConfigurationError(f"layer {index} is of type {types[index]!r}, which is not supported")
        return bool(types[index] == "full_attention")


_UNREAD: Any = None  # weights that `_stored` fills in


def _dense(name: str, size_n: int, size_k: int) -> Dense:
    return Dense(name, size_n, size_k, 0, _UNREAD)


def _plain(model: _Model, index: int, method: str | None) -> _Found:
    """Attention and one MLP: Llama, Qwen3."""
    yield from model.attention()
    yield from model.mlp("mlp", "intermediate_size", model.number("intermediate_size"))


def _qwen3_moe(model: _Model, index: int, method: str | None) -> _Found:
    yield from model.attention()
    yield from _qwen_experts(model, index)


def _qwen3_next(model: _Model, index: int, method: str | None) -> _Found:
    yield from _qwen_mixed_attention(model, index, method, interleaved=True)
    yield from _qwen_experts(model, index)


def _qwen3_5(model: _Model, index: int, method: str | None) -> _Found:
    yield from _qwen_mixed_attention(model, index, method, interleaved=False)
    yield from model.mlp("mlp", "intermediate_size", model.number("intermediate_size"))


def _qwen3_5_moe(model: _Model, index: int, method: str | None) -> _Found:
    yield from _qwen_mixed_attention(model, index, method, interleaved=False)
    yield from _qwen_experts(model, index)


def _qwen_mixed_attention(model: _Model, index: int, method: str | None, interleaved: bool) -> _Found:
    if model.is_full_attention(index):
        yield from model.attention(gate=bool(model.get("attn_output_gate", True)))
    else:
        yield from model.linear_attention(interleaved, method)


def _qwen_experts(model: _Model, index: int) -> _Found:
    if not model.has_experts(index):
        yield from model.mlp("mlp", "intermediate_size", model.number("intermediate_size"))
        return
    inner = model.number("moe_intermediate_size")
    yield from model.experts("mlp.experts", model.number("num_experts"), "moe_intermediate_size", inner)
    if shared := model.number("shared_expert_intermediate_size", default=0, least=0):
        yield from model.mlp("mlp.shared_expert", "shared_expert_intermediate_size", shared)


def _glm4_moe(model: _Model, index: int, method: str | None) -> _Found:
    yield from model.attention()
    if index < model.number("first_k_dense_replace", default=0, least=0):
        yield from model.mlp("mlp", "intermediate_size", model.number("intermediate_size"))
        return
    inner = model.number("moe_intermediate_size")
    yield from model.experts("mlp.experts", model.number("n_routed_experts"), "moe_intermediate_size", inner)
    if shared := model.number("n_shared_experts", default=0, least=0):
        yield from model.mlp("mlp.shared_experts", "the width of the shared experts", inner * shared)


def _minimax_m2(model: _Model, index: int, method: str | None) -> _Found:
    yield from model.attention()
    inner = model.number("intermediate_size")
    yield from model.experts("block_sparse_moe.experts", model.number("num_local_experts"), "intermediate_size", inner)


def _gpt_oss(model: _Model, index: int, method: str | None) -> _Found:
    yield from model.attention("attn")
    inner = model.number("intermediate_size")
    yield from model.experts("mlp.experts", model.number("num_local_experts"), "intermediate_size", inner)


_KINDS: Mapping[str, _Kind] = {
    "llama": _plain,
    "mistral": _plain,
    "qwen2": _plain,
    "qwen3": _plain,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_5,
    "qwen3_5_text": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "qwen3_5_moe_text": _qwen3_5_moe,
    "glm4_moe": _glm4_moe,
    "minimax_m2": _minimax_m2,
    "gpt_oss": _gpt_oss,
}
