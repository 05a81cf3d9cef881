"""One rank's shard of a model as a complete model, so that its decode step can be timed on one GPU.

The kernels have the same sizes as on a rank of the pair; there are no collectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_spark.errors import ConfigurationError
from vllm_spark.models.layers import model_layers

_HEADS = ("num_attention_heads", "num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads")
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
_VOCABULARY = "vocab_size"


def shard_as_model(config: Mapping[str, Any], tp: int) -> dict[str, Any]:
    """The configuration of a model whose every layer has the size of one rank's shard of `config`.

    Args:
        config: a config.json.
        tp: ranks.

    Raises:
        ConfigurationError: heads, or a width that a layer has, do not divide.
    """
    parts = [shard := dict(config)]
    if isinstance(text := config.get("text_config"), Mapping):
        parts.append(dict(text))
        shard["text_config"] = parts[-1]
    for part in parts:
        numbers = {name: value for name, value in part.items() if type(value) is int}
        hidden, heads = numbers.get("hidden_size"), numbers.get("num_attention_heads")
        if tp > 1 and hidden and heads and part.get("head_dim") is None:
            part["head_dim"] = hidden // heads
        for name in _HEADS:
            if name in numbers:
                part[name] = _heads(name, numbers[name], tp)
        for name in _WIDTHS:
            if name in numbers:
                part[name], rest = divmod(numbers[name], tp)
                if rest:
                    model_layers(config, tp)  # raises, unless no layer has this width
        if _VOCABULARY in numbers:
            part[_VOCABULARY] = -(-numbers[_VOCABULARY] // tp)  # vLLM pads what does not divide
    return shard


def _heads(name: str, heads: int, tp: int) -> int:
    """Heads of one rank; with fewer key-value heads than ranks, each rank has one."""
    if name == "num_key_value_heads" and 0 < heads < tp and tp % heads == 0:
        return 1
    if heads % tp:
        raise ConfigurationError(f"{name} is {heads}, which {tp} ranks cannot share; choose another --tp")
    return heads // tp
