"""The matrices of a model on one rank, and their bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_spark.models.attention import SequenceMemory, sequence_memory
from vllm_spark.models.layers import Dense, Experts, Layer
from vllm_spark.models.regroup import layers_as_served
from vllm_spark.models.text_model import TextModel
from vllm_spark.models.weights import Bf16, Fp8Block, Int4, Int8, Mxfp4, Nvfp4, Weights
from vllm_spark.tune.table_shapes import padded_experts

SMALL_BYTES = 2
"""Of a number of activations, routers, norms and embeddings: bfloat16."""


@dataclass(frozen=True)
class Model:
    """One rank's part of a model.

    Attributes:
        tp: ranks.
        layers: linear layers and experts, with counts.
        memories: what its layers keep of each sequence, with counts.
        hidden: width of the model.
        vocabulary: rows of the whole output head.
        embeddings: whether it has embeddings of its own, apart from the head.
        head: how the output head is stored.
        decoder_layers: in all.
        expert_parallel: whether each rank has whole experts, half of them, and not half of each.
    """

    tp: int
    layers: tuple[Layer, ...]
    memories: tuple[SequenceMemory, ...]
    hidden: int
    vocabulary: int
    embeddings: bool
    head: Weights
    decoder_layers: int
    expert_parallel: bool = False

    @property
    def dense(self) -> Iterable[Dense]:
        """Its linear layers, without routers and the head."""
        return (layer for layer in self.layers if isinstance(layer, Dense))

    @property
    def experts(self) -> Iterable[Experts]:
        """Its blocks of routed experts."""
        return (layer for layer in self.layers if isinstance(layer, Experts))

    @property
    def mixers(self) -> int:
        """Layers that mix tokens."""
        return sum(each.count for each in self.memories)

    @property
    def mlps(self) -> int:
        """Layers that have an MLP or experts."""
        plain = sum(layer.count for layer in self.dense if is_mlp_end(layer) and not is_shared(layer))
        return plain + sum(layer.count for layer in self.experts)

    @property
    def own_vocabulary(self) -> int:
        """Rows of the output head on this rank."""
        return -(-self.vocabulary // self.tp)

    @property
    def head_bytes(self) -> float:
        """Of this rank's part of the output head."""
        return self.own_vocabulary * self.hidden * bytes_of_weight(self.head, self.hidden)

    def router_bytes(self, layer: Experts) -> int:
        """Of one layer's router, which every rank has whole."""
        return layer.experts * self.hidden * SMALL_BYTES

    @property
    def weight_bytes(self) -> float:
        """Of all weights on this rank."""
        layers = sum(layer.count * dense_bytes(layer) for layer in self.dense)
        experts = sum(
            layer.count * (layer.experts * expert_bytes(layer) + self.router_bytes(layer)) for layer in self.experts
        )
        embeddings = self.own_vocabulary * self.hidden * SMALL_BYTES if self.embeddings else 0
        return layers + experts + embeddings + self.head_bytes


def read_model(config: Mapping[str, Any], tp: int, expert_parallel: bool = False) -> Model:
    """One rank's part of the model of a config.json.

    Raises:
        ConfigurationError: the architecture or the format of the weights is not supported, or a value is missing.
    """
    text = TextModel(config, tp)
    return Model(
        tp=tp,
        layers=tuple(layers_as_served(config, tp)),
        memories=tuple(sequence_memory(config, tp)),
        hidden=text.number("hidden_size"),
        vocabulary=text.number("vocab_size"),
        embeddings=not (text.get("tie_word_embeddings") or config.get("tie_word_embeddings")),
        head=Bf16(),
        decoder_layers=text.layers,
        expert_parallel=expert_parallel and tp > 1,
    )


def stored_as(model: Model, weights: Weights) -> Model:
    """The same model with all of its linear layers, experts and the head stored in another format."""
    layers = tuple(replace(layer, weights=weights) for layer in model.layers)
    return replace(model, layers=layers, head=weights)


def is_mlp_end(layer: Dense) -> bool:
    """Whether it is the last matrix of an MLP, or of shared experts."""
    return layer.name.endswith("down_proj")


def is_shared(layer: Dense) -> bool:
    """Whether it belongs to shared experts."""
    return "share" in layer.name


def dense_bytes(layer: Dense) -> float:
    """Of one such layer on this rank."""
    return layer.size_n * layer.size_k * bytes_of_weight(layer_weights(layer), layer.size_k)


def layer_weights(layer: Dense) -> Weights:
    """How a step reads the layer: vLLM keeps MLA's `kv_b_proj` unquantized, since it multiplies the queries with it."""
    return Bf16() if layer.name.endswith("kv_b_proj") else layer.weights


def expert_bytes(layer: Experts) -> float:
    """Of one expert on this rank, with what vLLM pads it with."""
    hidden, inner = padded_experts(layer)
    gate_up = 2 if layer.gated else 1
    return hidden * inner * (gate_up * bytes_of_weight(layer.weights, hidden) + bytes_of_weight(layer.weights, inner))


def bytes_of_weight(weights: Weights, inputs: int) -> float:
    """Of one weight with its share of scales and zero points; `inputs` are those of a column."""
    if isinstance(weights, Bf16):
        return 2.0
    if isinstance(weights, Int4):
        group = weights.group_size if weights.group_size > 0 else inputs
        return 0.5 + (2.5 if weights.zero_points else 2.0) / group
    if isinstance(weights, Int8):
        return 1.0 + 2.0 / (weights.group_size if weights.group_size > 0 else inputs)
    if isinstance(weights, Mxfp4):
        return 0.5 + 1 / 32
    if isinstance(weights, Nvfp4):
        return 0.5 + 1 / 16
    return 1.0 + (4 / math.prod(weights.block) if isinstance(weights, Fp8Block) else 0.0)
