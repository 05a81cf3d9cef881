"""The linear layers and experts of a model, with the shapes that one rank multiplies, from its config.json.

Shards as vLLM 0.33 makes them (`vllm/model_executor/models/`): query heads, intermediate widths and the heads of linear
attention are divided by the tensor-parallel size; key and value heads are too, and repeated where there are fewer of
them than ranks. Routers, embeddings, the output head, vision towers and draft layers are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_spark.errors import ConfigurationError
from vllm_spark.models.text_model import TextModel
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
        hidden: width of the model, or of the latent vectors on which the experts work.
        intermediate: an expert's inner width on this rank, before any padding.
        count: layers of the model that are like this.
        weights: how they are stored.
        gated: whether an expert has gate, up and down; without a gate it has up and down.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    count: int
    weights: Weights
    gated: bool = True


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
    model = _Layers(config, tp)
    kind = model.kind()
    read, method = weights_reader(config)
    found: Counter[Layer] = Counter()
    for index in range(model.layers):
        for layer, parts in kind(model, index, method):
            found[_stored(layer, index, parts, read, model.nested)] += 1
    return [replace(layer, count=count) for layer, count in found.items()]


_Parts = tuple[str, ...]
_QKV: _Parts = ("q_proj", "k_proj", "v_proj")
_GATE_UP: _Parts = ("gate_proj", "up_proj")
_NONE: _Parts = ()


def _stored(layer: Layer, index: int, parts: _Parts, read: Reader, nested: bool) -> Layer:
    """The layer with its weights, found by its name in the checkpoint."""
    roots = ["model.layers", "backbone.layers"]
    if nested:
        roots += ["model.language_model.layers", "language_model.model.layers"]
    fused = tuple(f"{root}.{index}.{layer.name}" for root in roots)
    if isinstance(layer, Experts):
        names = tuple(tuple(f"{name}.0.{part}" for part in (*_GATE_UP, "down_proj")) for name in fused)
    else:
        names = tuple(tuple(f"{name.rpartition('.')[0]}.{p}" for p in parts) or (name,) for name in fused)
    return replace(layer, weights=read(LayerName(fused, names, isinstance(layer, Experts))))


_Found = Iterator[tuple[Layer, _Parts]]
_Kind = Callable[["_Layers", int, "str | None"], _Found]


class _Layers(TextModel):
    """One rank's layers of a model."""

    def kind(self) -> _Kind:
        """The function that yields the layers of this type of model."""
        if self.type in _KINDS:
            return _KINDS[self.type]
        raise ConfigurationError(
            f"model_type {self.type or 'nothing'!r} is not supported; supported are {', '.join(sorted(_KINDS))}"
        )

    def attention(self, index: int, name: str = "self_attn", gate: bool = False) -> _Found:
        """Fused query, key and value, and the output projection; a gate doubles the queries."""
        hidden, heads = self.number("hidden_size"), self.heads(index)
        queries = heads.queries * (2 if gate else 1)
        fused = (queries + heads.keys) * heads.width + heads.keys * heads.value_width
        yield _dense(f"{name}.qkv_proj", fused, hidden), _QKV
        yield _dense(f"{name}.o_proj", hidden, heads.queries * heads.value_width), _NONE

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

    def latent_attention(self) -> _Found:
        """Multi-head latent attention: projections to the latent vectors, which each rank has whole, and from them."""
        hidden, own = self.number("hidden_size"), self.share("num_attention_heads", self.number("num_attention_heads"))
        rank, rope = self.number("kv_lora_rank"), self.number("qk_rope_head_dim", least=0)
        inner, value = self.number("qk_nope_head_dim"), self.number("v_head_dim")
        queries = own * (inner + rope)
        if query_rank := self.number("q_lora_rank", default=0, least=0):
            parts = ("q_a_proj", "kv_a_proj_with_mqa")
            yield _dense("self_attn.fused_qkv_a_proj", query_rank + rank + rope, hidden), parts
            yield _dense("self_attn.q_b_proj", queries, query_rank), _NONE
        else:
            yield _dense("self_attn.q_proj", queries, hidden), _NONE
            yield _dense("self_attn.kv_a_proj_with_mqa", rank + rope, hidden), _NONE
        yield _dense("self_attn.kv_b_proj", own * (inner + value), rank), _NONE
        yield _dense("self_attn.o_proj", hidden, own * value), _NONE

    def state_space(self) -> _Found:
        """Mamba-2: one projection to gate, inputs, both state matrices and time steps, and the output projection."""
        hidden, heads = self.number("hidden_size"), self.number("mamba_num_heads")
        inner = self.share("mamba_num_heads", heads) * self.number("mamba_head_dim")
        groups = self.share("n_groups", self.number("n_groups"))
        states = 2 * groups * self.number("ssm_state_size")
        yield _dense("mixer.in_proj", 2 * inner + states + heads // self.tp, hidden), _NONE
        yield _dense("mixer.out_proj", hidden, inner), _NONE

    def ungated_mlp(self, name: str, what: str, intermediate: int) -> _Found:
        """Up and down."""
        hidden, own = self.number("hidden_size"), self.share(what, intermediate)
        yield _dense(f"{name}.up_proj", own, hidden), _NONE
        yield _dense(f"{name}.down_proj", hidden, own), _NONE

    def mlp(self, name: str, what: str, intermediate: int) -> _Found:
        """Fused gate and up, and down."""
        hidden, own = self.number("hidden_size"), self.share(what, intermediate)
        yield _dense(f"{name}.gate_up_proj", 2 * own, hidden), _GATE_UP
        yield _dense(f"{name}.down_proj", hidden, own), _NONE

    def experts(
        self, name: str, experts: int, what: str, intermediate: int, hidden: int | None = None, gated: bool = True
    ) -> _Found:
        """Routed experts, each sharded along its width; `hidden` is the width on which they work, if another."""
        top_k = self.number("num_experts_per_tok", "experts_per_token", "moe_top_k")
        if not 0 < top_k <= experts:
            raise ConfigurationError(f"num_experts_per_tok is {top_k} of {experts} experts in config.json")
        own = self.share(what, intermediate)
        yield Experts(name, experts, top_k, hidden or self.number("hidden_size"), own, 0, _UNREAD, gated), _NONE


_UNREAD: Any = None  # weights that `_stored` fills in


def _dense(name: str, size_n: int, size_k: int) -> Dense:
    return Dense(name, size_n, size_k, 0, _UNREAD)


def _plain(model: _Layers, index: int, method: str | None) -> _Found:
    """Attention and one MLP: Llama, Qwen3."""
    yield from model.attention(index)
    yield from model.mlp("mlp", "intermediate_size", model.number("intermediate_size"))


def _qwen3_moe(model: _Layers, index: int, method: str | None) -> _Found:
    yield from model.attention(index)
    yield from _qwen_experts(model, index)


def _qwen3_next(model: _Layers, index: int, method: str | None) -> _Found:
    yield from _qwen_mixed_attention(model, index, method, interleaved=True)
    yield from _qwen_experts(model, index)


def _qwen3_5(model: _Layers, index: int, method: str | None) -> _Found:
    yield from _qwen_mixed_attention(model, index, method, interleaved=False)
    yield from model.mlp("mlp", "intermediate_size", model.number("intermediate_size"))


def _qwen3_5_moe(model: _Layers, index: int, method: str | None) -> _Found:
    yield from _qwen_mixed_attention(model, index, method, interleaved=False)
    yield from _qwen_experts(model, index)


def _qwen_mixed_attention(model: _Layers, index: int, method: str | None, interleaved: bool) -> _Found:
    if model.mixer(index) == "full":
        yield from model.attention(index, gate=bool(model.get("attn_output_gate", True)))
    else:
        yield from model.linear_attention(interleaved, method)


def _qwen_experts(model: _Layers, index: int) -> _Found:
    if not model.has_experts(index):
        yield from model.mlp("mlp", "intermediate_size", model.number("intermediate_size"))
        return
    inner = model.number("moe_intermediate_size")
    yield from model.experts("mlp.experts", model.number("num_experts"), "moe_intermediate_size", inner)
    if shared := model.number("shared_expert_intermediate_size", default=0, least=0):
        yield from model.mlp("mlp.shared_expert", "shared_expert_intermediate_size", shared)


def _glm4_moe(model: _Layers, index: int, method: str | None) -> _Found:
    yield from model.attention(index)
    yield from _deepseek_experts(model, index)


def _deepseek(model: _Layers, index: int, method: str | None) -> _Found:
    yield from model.latent_attention()
    yield from _deepseek_experts(model, index)


def _deepseek_experts(model: _Layers, index: int) -> _Found:
    dense = index < model.number("first_k_dense_replace", default=0, least=0)
    if dense or index % model.number("moe_layer_freq", default=1):
        yield from model.mlp("mlp", "intermediate_size", model.number("intermediate_size"))
        return
    inner = model.number("moe_intermediate_size")
    yield from model.experts("mlp.experts", model.number("n_routed_experts"), "moe_intermediate_size", inner)
    if shared := model.number("n_shared_experts", default=0, least=0):
        yield from model.mlp("mlp.shared_experts", "the width of the shared experts", inner * shared)


def _nemotron_h(model: _Layers, index: int, method: str | None) -> _Found:
    """A mixer or an MLP in each layer; experts may work on latent vectors, narrower than the model."""
    letter = model.hybrid_letter(index)
    if letter == "M":
        yield from model.state_space()
    elif letter == "*":
        yield from model.attention(index, "mixer")
    elif letter == "-":
        yield from model.ungated_mlp("mixer", "intermediate_size", model.number("intermediate_size"))
    else:
        hidden = model.number("hidden_size")
        latent = model.number("moe_latent_size", default=hidden)
        if latent != hidden:
            yield _dense("mixer.fc1_latent_proj", latent, hidden), _NONE
            yield _dense("mixer.fc2_latent_proj", hidden, latent), _NONE
        inner, what = model.number("moe_intermediate_size"), "moe_intermediate_size"
        yield from model.experts("mixer.experts", model.number("n_routed_experts"), what, inner, latent, gated=False)
        if shared := model.number("moe_shared_expert_intermediate_size", default=0, least=0):
            yield from model.ungated_mlp("mixer.shared_experts", "moe_shared_expert_intermediate_size", shared)


def _minimax_m2(model: _Layers, index: int, method: str | None) -> _Found:
    yield from model.attention(index)
    inner = model.number("intermediate_size")
    yield from model.experts("block_sparse_moe.experts", model.number("num_local_experts"), "intermediate_size", inner)


def _gpt_oss(model: _Layers, index: int, method: str | None) -> _Found:
    yield from model.attention(index, "attn")
    inner = model.number("intermediate_size")
    yield from model.experts("mlp.experts", model.number("num_local_experts"), "intermediate_size", inner)


def _mimo_v2(model: _Layers, index: int, method: str | None) -> _Found:
    yield from model.attention(index)
    if model.get("moe_layer_freq") is not None:
        sparse = bool(model.entry("moe_layer_freq", index))
    else:
        sparse = model.entry("mlp_layer_types", index) == "sparse"
    if not sparse:
        yield from model.mlp("mlp", "intermediate_size", model.number("intermediate_size"))
        return
    inner = model.number("moe_intermediate_size")
    yield from model.experts("mlp.experts", model.number("n_routed_experts"), "moe_intermediate_size", inner)


def _step3p5(model: _Layers, index: int, method: str | None) -> _Found:
    """As vLLM 0.32's: with `moe_layers_enum`, a text with the numbers of layers that have experts."""
    yield from model.attention(index)
    if model.get("use_head_wise_attn_gate"):
        yield _dense("self_attn.g_proj", model.heads(index).queries, model.number("hidden_size")), _NONE
    sparse = [word.strip() for word in str(model.get("moe_layers_enum", "")).split(",")]
    if str(index) not in sparse:
        yield from model.mlp("mlp", "intermediate_size", model.number("intermediate_size"))
        return
    inner = model.number("moe_intermediate_size")
    yield from model.experts("moe.experts", model.number("moe_num_experts"), "moe_intermediate_size", inner)
    yield from model.mlp("moe.share_expert", "share_expert_dim", model.number("share_expert_dim"))


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
    "glm4_moe_lite": _deepseek,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "nemotron_h": _nemotron_h,
    "mimo_v2": _mimo_v2,
    "mimo_v2_flash": _mimo_v2,
    "step3p5": _step3p5,
    "minimax_m2": _minimax_m2,
    "gpt_oss": _gpt_oss,
}
