"""One rank's share of a model as a model of its own, so that its decode step can be timed on one GPU.

The kernels have the sizes that they have on a rank of the pair; only the collectives are not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_spark.errors import ConfigurationError

_SHARED_OUT = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "vocab_size",
)
"""What tensor parallelism shares out among the ranks; of fewer key-value heads than ranks, each rank has one."""


def shard_as_model(config: Mapping[str, Any], tp: int) -> dict[str, Any]:
    """The configuration of a model whose every layer has the size of one rank's shard of `config`.

    Args:
        config: a config.json.
        tp: ranks.

    Raises:
        ConfigurationError: something does not divide.
    """
    shard = {name: dict(value) if name == "text_config" else value for name, value in config.items()}
    parts: list[dict[str, Any]] = [shard, shard.get("text_config", {})]
    for part in parts:
        if tp > 1 and "head_dim" not in part and "num_attention_heads" in part:
            part["head_dim"] = part["hidden_size"] // part["num_attention_heads"]
        for name in _SHARED_OUT:
            value = part.get(name)
            if not isinstance(value, int):
                continue
            if name == "num_key_value_heads" and 0 < value < tp and tp % value == 0:
                part[name] = 1
                continue
            if value % tp:
                raise ConfigurationError(f"{name} is {value}, which {tp} ranks cannot share; choose another --tp")
            part[name] = value // tp
    return shard
