"""Speculation: what a draft costs a step, and how many tokens a step then makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_spark.errors import ConfigurationError
from vllm_spark.estimate.collectives import Collectives
from vllm_spark.estimate.gpu import Gpu
from vllm_spark.estimate.model import Model, read_model
from vllm_spark.estimate.step import Part, Workload, draft_pass
from vllm_spark.models.config_values import whole_number
from vllm_spark.models.layers import Dense
from vllm_spark.models.text_model import TextModel
from vllm_spark.models.weights import Bf16, Int4, Mxfp4, Nvfp4


@dataclass(frozen=True)
class Speculation:
    """How a step speculates.

    Attributes:
        drafted: tokens for each sequence.
        acceptance: probability that a drafted token is accepted if all before it were.
        draft: the model that drafts, one rank's part; None: drafts cost nothing (n-gram, suffix).
    """

    drafted: int
    acceptance: float
    draft: Model | None

    @property
    def tokens(self) -> float:
        """Expected tokens of a step for each sequence: the accepted ones, and one of the model itself."""
        return sum(self.acceptance**count for count in range(self.drafted + 1))

    def cost(self, work: Workload, gpu: Gpu, collectives: Collectives | None) -> list[Part]:
        """The forward passes of the draft, one for each drafted token."""
        if self.draft is None:
            return []
        return [draft_pass(self.draft, replace(work, rows=1), gpu, collectives)] * self.drafted


def eagle_head(config: Mapping[str, Any], tp: int) -> Model:
    """An EAGLE or EAGLE3 head: decoder layers whose first reads embeddings beside hidden states, and a head of its own.

    Args:
        config: of the head; `draft_vocab_size` is EAGLE3's smaller vocabulary.
        tp: ranks.

    Raises:
        ConfigurationError: the config is not supported.
    """
    model = read_model({**config, "model_type": "llama"}, tp)
    hidden = model.hidden
    layers = [
        replace(layer, size_k=2 * hidden) if layer.name == "self_attn.qkv_proj" and isinstance(layer, Dense) else layer
        for layer in model.layers
    ]
    layers.append(Dense("fc_proj", hidden, 3 * hidden, 1, Bf16()))  # joins the states of three layers of the target
    vocabulary = whole_number(config, "draft_vocab_size") or model.vocabulary
    return replace(model, layers=tuple(layers), vocabulary=vocabulary, embeddings=False)


def own_draft_layer(config: Mapping[str, Any], tp: int) -> Model:
    """The layer with which a model drafts by itself (MTP): one more decoder layer, and the model's own output head.

    Int4 and 4-bit float checkpoints keep it in bfloat16.

    Raises:
        ConfigurationError: the model has none, or is not supported.
    """
    language_model = TextModel(config, tp)
    text = language_model.config
    if not any(text.get(key) or config.get(key) for key in _MTP_KEYS):
        raise ConfigurationError(
            f"config.json has none of {', '.join(_MTP_KEYS)}, so the model has no layer that drafts; give another "
            "draft with --draft"
        )
    one = {**text, "num_hidden_layers": 1, "layer_types": ["full_attention"], "first_k_dense_replace": 0}
    one |= {"full_attention_interval": 1, "hybrid_override_pattern": "*E"}
    if language_model.type == "nemotron_h":
        one["num_hidden_layers"] = 2
    whole = {**config, "text_config": one} if language_model.nested else one
    model = read_model(whole, tp)
    layers = tuple(
        replace(layer, weights=Bf16()) if isinstance(layer.weights, Int4 | Mxfp4 | Nvfp4) else layer
        for layer in model.layers
    )
    joins = Dense("eh_proj", model.hidden, 2 * model.hidden, 1, Bf16())
    return replace(model, layers=(*layers, joins), embeddings=False)


_MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""Keys of config.json by which models name the number of their draft layers."""
