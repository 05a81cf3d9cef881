"""Checks whether two ranks can divide a model: heads, widths and experts, quantization groups, and blocks of scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from vllm_spark.backend.support import check_halves
from vllm_spark.doctor.finding import Finding
from vllm_spark.errors import ConfigurationError, upper_first
from vllm_spark.models.layers import Dense, Experts, Layer
from vllm_spark.models.regroup import layers_as_served, planned_groups
from vllm_spark.models.weights import Fp8Block, Int4, Int8
from vllm_spark.ranks import WORLD_SIZE

_SMALLEST_GROUP = 32
"""Marlin's; a larger group is a multiple of it."""
_DIVIDED_INPUTS = ("o_proj", "out_proj", "down_proj")
_COUNTS = (
    (("num_attention_heads",), "heads"),
    (("num_key_value_heads", "num_attention_groups"), "KV heads"),
    (("linear_num_value_heads",), "heads of linear attention"),
    (("num_experts", "n_routed_experts", "num_local_experts"), "experts"),
    (("moe_intermediate_size",), "of an expert's width"),
    (("intermediate_size",), "of an MLP's width"),
)
"""Keys of config.json of which the first counts, and what they number."""


def check_division(name: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings about the division of a model.

    Args:
        name: what `vllm serve` is given.
        config: the content of its config.json.
    """
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    yield _halves(name, config, text)
    yield _groups(name, config)


def _halves(name: str, config: Mapping[str, Any], text: Mapping[str, Any]) -> Finding:
    title = "Divides by two ranks"
    sizes = ", ".join(f"{size} {what}" for keys, what in _COUNTS if (size := _first(text, keys)))
    try:
        check_halves(SimpleNamespace(**{key: value for key, value in text.items() if str(key)}), False, "this model")
        layers = layers_of(config)
    except ConfigurationError as error:
        return Finding(
            "model.division",
            title,
            "problem",
            sizes or "no",
            f"{_sentence(error)} Each rank computes half of every layer.",
            f"vllm serve {name}   # one machine alone, without --spark",
        )
    for layer in layers or ():
        if fault := _block_fault(layer):
            return Finding(
                "model.division",
                title,
                "problem",
                fault,
                "vLLM refuses fp8 weights whose blocks of scales are cut by the border between the ranks.",
                f"vllm serve {name}   # one machine alone; or take a checkpoint with a scale for each channel",
            )
    keys = _first(text, ("num_key_value_heads", "num_attention_groups"))
    repeated = ", the KV head on both" if keys == 1 else ""
    return Finding("model.division", title, "ok", f"{sizes}{repeated}")


def layers_of(config: Mapping[str, Any]) -> list[Layer] | None:
    """One rank's layers; None if the arithmetic of this project does not know the model.

    Raises:
        ConfigurationError: it does, and two ranks cannot divide the model.
    """
    try:
        layers_as_served(config, 1)
    except ConfigurationError:
        return None
    return layers_as_served(config, WORLD_SIZE)


def _block_fault(layer: Layer) -> str:
    """Which width of a layer is not a multiple of its blocks of scales; empty if none is."""
    if not isinstance(layer.weights, Fp8Block):
        return ""
    rows, columns = layer.weights.block
    if isinstance(layer, Experts):
        if layer.intermediate % rows == layer.intermediate % columns == 0:
            return ""
        return f"{layer.intermediate} of an expert's width on each rank, in blocks of {rows} x {columns}"
    if isinstance(layer, Dense) and layer.name.rpartition(".")[2] in _DIVIDED_INPUTS and layer.size_k % columns:
        return f"{layer.size_k} inputs of {layer.name} on each rank, in blocks of {rows} x {columns}"
    return ""


def _groups(name: str, config: Mapping[str, Any]) -> Finding:
    title = "Quantization groups"
    try:
        plan = planned_groups(config, WORLD_SIZE)
        layers = layers_of(config) or []
    except ConfigurationError as error:
        return Finding(
            "model.groups",
            title,
            "problem",
            "not aligned to the ranks",
            f"{_sentence(error)} A group's scale would count on both ranks, which no kernel supports.",
            f"vllm serve {name}   # one machine alone, without --spark",
        )
    sizes = sorted({layer.weights.group_size for layer in layers if isinstance(layer.weights, Int4 | Int8)})
    if plan is None:
        shown = ", ".join("one a column" if size < 0 else str(size) for size in sizes)
        if not shown:
            return Finding("model.groups", title, "not applicable", "its weights have none")
        return Finding("model.groups", title, "ok", f"{shown}, aligned to both ranks")
    if not plan.repeated:
        return Finding(
            "model.groups",
            title,
            "warning",
            f"{plan.worst.name} {plan.worst.size} in groups of {plan.worst.group_size}",
            f"In config.json {plan.worst.reason()}. vLLM then runs the experts with its own kernel in place of Marlin, "
            "which is slower.",
            f"vllm-spark estimate {name}   # with Marlin; a checkpoint with groups of {plan.smaller} would reach it"
            if plan.smaller % _SMALLEST_GROUP == 0
            else f"vllm serve {name}   # one machine alone, without --spark",
        )
    return Finding(
        "model.groups",
        title,
        "note",
        f"{plan.worst.group_size}, served as {plan.smaller}",
        f"In config.json {plan.worst.reason()}: each scale is repeated for groups of {plan.smaller}. The weights keep "
        "their values; the scales take more of the memory that a step reads.",
        f"vllm-spark estimate {name}   # counts the smaller groups",
    )


def _sentence(error: ConfigurationError) -> str:
    """The error without its remedy, which may begin with a key of config.json."""
    reason = str(error).partition("; ")[0]
    return f"In config.json {reason}." if "_" in reason.partition(" ")[0] else f"{upper_first(reason)}."


def _first(text: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """The first value that is a positive number; 0 if none is."""
    return next((value for key in keys if type(value := text.get(key)) is int and value > 0), 0)
