"""Regroups quantized models whose quantization groups are not aligned to the ranks' shards.

A matrix that is split along its input has one scale for each group of, for example, 128 inputs. Of 1408 inputs each
rank has 704: five and a half groups, which no kernel supports. Repeated once, each scale stands for two groups of 64,
and 704 is 11 of those. Every weight keeps its value, bit for bit; scales grow from 3 % of the bytes to 6 %.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vllm_spark.compat.patching import all_patches, state_of
from vllm_spark.config.settings import FLAG
from vllm_spark.errors import ConfigurationError
from vllm_spark.models.layers import Experts, Layer, model_layers
from vllm_spark.models.weights import Int4, Int8

logger = logging.getLogger("vllm_spark")

GROUP_SIZES = (32, 64, 128)
"""Group sizes that vLLM has kernels for."""

_ATTRIBUTE = "spark_repeated_scales"
_PATCH = "repeated-scales"
_DIVIDED_INPUTS = frozenset({"o_proj", "out_proj", "down_proj"})
"""Linear layers that are sharded along their input; the others are sharded along their output, which cuts no group."""
_WIDTHS = {
    "mlp.down_proj": "intermediate_size",
    "mlp.shared_expert.down_proj": "shared_expert_intermediate_size",
}
"""Keys of config.json that hold the input widths of layers."""
_ALL_EXPERTS = frozenset({"mixtral", "phimoe", "granitemoe", "minimax_m2"})
"""Model types whose `intermediate_size` is the width of their experts, and whose layers all have experts."""
_LOADERS = frozenset({"auto", "hf", "safetensors", "fastsafetensors", "mistral", "npcache", "pt", "dummy"})
"""Load formats of the loader whose scales are repeated, and `dummy`, which loads no weights."""


@dataclass(frozen=True)
class MisalignedGroups:
    """A sharded width whose share of one rank is not a multiple of the group size.

    Attributes:
        name: of the width.
        size: the width, before it is sharded.
        ranks: that share it.
        group_size: weights that share a scale.
        experts: whether it is the width of routed experts.
    """

    name: str
    size: int
    ranks: int
    group_size: int
    experts: bool = False

    @property
    def per_rank(self) -> int:
        """The width of one rank's shard."""
        return self.size // self.ranks

    def reason(self) -> str:
        """The misalignment as a sentence without its end."""
        return (
            f"{self.name} is {self.size}, and the {self.per_rank} of one rank are not a multiple of "
            f"the quantization group size {self.group_size}"
        )


def apply_regrouping(vllm_config: Any, ranks: int) -> None:
    """Changes vLLM's configuration to smaller groups, if the model's own are not aligned to the shards.

    The scales are repeated when the weights are loaded (`repeat_scales`).

    Raises:
        ConfigurationError: the groups are misaligned and cannot be made smaller; the message names the width, the
            group size and a remedy.
    """
    model_config = vllm_config.model_config
    described = _description(model_config.hf_config)
    group_size = None if described is None else _group_size(described)
    if described is None or group_size is None or group_size <= 0:
        return
    config = _Attributes(model_config.hf_config, model_config.hf_text_config)
    found = misaligned_groups(config, group_size, ranks, vllm_config.parallel_config.enable_expert_parallel)
    plan = _plan(found, described, group_size, vllm_config.load_config.load_format)
    if plan is None or not plan.repeated:
        return
    worst, smaller = plan.worst, plan.smaller
    drafts = _drafts_of_the_same_weights(vllm_config, described, group_size)
    request = [str(described["quant_method"]), group_size // smaller]
    for hf_config in (model_config.hf_config, *drafts):
        setattr(hf_config, _ATTRIBUTE, request)
        if (its := _description(hf_config)) is not None:
            _set_group_size(its, smaller)
    vllm_config.quant_config = type(vllm_config).get_quantization_config(model_config, vllm_config.load_config)
    logger.info(
        "%s: each scale is repeated, for groups of %d; the values of the weights do not change.",
        worst.reason(),
        smaller,
    )


@dataclass(frozen=True)
class GroupPlan:
    """How groups that are not aligned to the shards are served.

    Attributes:
        worst: of the misaligned widths the one with the smallest possible groups.
        smaller: group size with which all of them would be aligned.
        repeated: whether scales are repeated for groups of that size; else vLLM's slow kernel runs the experts.
    """

    worst: MisalignedGroups
    smaller: int
    repeated: bool


def planned_groups(config: Mapping[str, Any], ranks: int) -> GroupPlan | None:
    """How `apply_regrouping` serves the model of a config.json; None if its groups are aligned, or it has none.

    Raises:
        ConfigurationError: they are misaligned and cannot be made smaller; or as for `regrouped_config`.
    """
    described = _description(_owner(config))
    group_size = None if described is None else _group_size(described)
    if described is None or group_size is None or group_size <= 0:
        return None
    return _plan(misaligned_groups(config, group_size, ranks, False), described, group_size, "auto")


def _plan(
    found: list[MisalignedGroups], described: MutableMapping[str, Any], group_size: int, load_format: Any
) -> GroupPlan | None:
    if not found:
        return None
    smaller = math.gcd(group_size, *(each.per_rank for each in found))
    worst = min(found, key=lambda each: math.gcd(group_size, each.per_rank))
    reason = _obstacle(described, group_size, smaller, load_format)
    if reason and (described["quant_method"] == "compressed-tensors" or not all(each.experts for each in found)):
        remedy = f"use a checkpoint with groups of {smaller}" if smaller in GROUP_SIZES else "use another checkpoint"
        raise ConfigurationError(f"{worst.reason()} ({reason}); {remedy}, or serve it without {FLAG}")
    return GroupPlan(worst, smaller, repeated=not reason)  # vLLM has a (slow) kernel for experts alone


def layers_as_served(config: Mapping[str, Any], tp: int) -> list[Layer]:
    """A model's layers with the quantization groups that `vllm serve --spark` uses: smaller ones if misaligned.

    Raises:
        ConfigurationError: as for `model_layers`.
    """
    return model_layers(regrouped_config(config, tp), tp)


def misaligned_groups(
    config: Mapping[str, Any], group_size: int, ranks: int, expert_parallel: bool
) -> list[MisalignedGroups]:
    """The sharded widths of a model's quantized layers that are not multiples of the group size.

    Args:
        config: the content of config.json.
        group_size: weights that share a scale, unless a layer has its own.
        ranks: that share a width.
        expert_parallel: experts are distributed, and not sharded.
    """
    try:
        widths = _widths_of_layers(config, ranks)
    except ConfigurationError:  # a model with unknown layers
        text = config.get("text_config")
        widths = _widths_of_numbers(text if isinstance(text, Mapping) else config, group_size, ranks)
    return [
        each
        for each in widths
        # A width that is not a multiple of the group size before sharding belongs to unquantized layers.
        if each.size > each.group_size > 0
        and each.size % each.group_size == each.size % ranks == 0
        and each.per_rank % each.group_size
        and not (each.experts and expert_parallel)
    ]


def _widths_of_layers(config: Mapping[str, Any], ranks: int) -> list[MisalignedGroups]:
    """The input widths of the model's layers that are quantized in groups."""
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    found: dict[MisalignedGroups, None] = {}
    for layer in model_layers(config, 1):
        if not isinstance(layer.weights, Int4 | Int8):
            continue
        group_size = layer.weights.group_size
        if isinstance(layer, Experts):
            name = next((n for n in ("moe_intermediate_size", "intermediate_size") if text.get(n)), layer.name)
            found[MisalignedGroups(name, layer.intermediate, ranks, group_size, experts=True)] = None
        elif layer.name.rpartition(".")[2] in _DIVIDED_INPUTS:
            name = _WIDTHS.get(layer.name, f"the input width of {layer.name}")
            found[MisalignedGroups(name, layer.size_k, ranks, group_size)] = None
    return list(found)


def _widths_of_numbers(text: Mapping[str, Any], group_size: int, ranks: int) -> list[MisalignedGroups]:
    """The input widths of layers, quantized or not, that numbers in config.json suggest."""

    def size(name: str) -> int:
        value = text.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    heads = size("num_attention_heads") * (size("v_head_dim") or size("head_dim"))
    experts = size("moe_intermediate_size")
    widths = {
        "shared_expert_intermediate_size": size("shared_expert_intermediate_size"),
        "the width of the shared experts": experts * size("n_shared_experts"),
        "the width of the attention heads": heads or size("hidden_size"),
        "the width of the linear attention heads": size("linear_num_value_heads") * size("linear_value_head_dim"),
    }
    of_experts = {"moe_intermediate_size": experts}
    if isinstance(kind := text.get("model_type"), str) and kind in _ALL_EXPERTS:
        of_experts["intermediate_size"] = size("intermediate_size")
    elif not _every_layer_is_sparse(text):
        widths["intermediate_size"] = size("intermediate_size")
    return [
        *(MisalignedGroups(name, width, ranks, group_size) for name, width in widths.items()),
        *(MisalignedGroups(name, width, ranks, group_size, experts=True) for name, width in of_experts.items()),
    ]


def _every_layer_is_sparse(text: Mapping[str, Any]) -> bool:
    """Whether config.json says, by one of the usual keys, that every layer has experts."""
    if not text.get("moe_intermediate_size"):
        return False
    if isinstance(types := text.get("mlp_layer_types"), list | tuple) and types:
        return all(each == "sparse" for each in types)
    if (step := text.get("decoder_sparse_step")) is not None:
        return bool(step == 1 and not text.get("mlp_only_layers"))
    return text.get("first_k_dense_replace") == 0 and text.get("moe_layer_freq", 1) == 1


def regrouped_config(config: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """A copy of a config.json with the groups that `apply_regrouping` uses for its model.

    Args:
        config: the content of config.json.
        ranks: that share the model.

    Raises:
        ConfigurationError: it is nested too deeply to be copied.
    """
    try:
        fitting = copy.deepcopy(dict(config))
    except RecursionError:
        raise ConfigurationError("config.json is nested too deeply; correct it") from None
    described = _description(_owner(fitting))
    group_size = None if described is None else _group_size(described)
    if described is None or group_size is None or group_size <= 0:
        return fitting
    smaller = math.gcd(group_size, *(each.per_rank for each in misaligned_groups(fitting, group_size, ranks, False)))
    if smaller != group_size and smaller in GROUP_SIZES and _obstacle_in_format(described, group_size) is None:
        _set_group_size(described, smaller)
    return fitting


def _owner(config: Mapping[str, Any]) -> SimpleNamespace:
    """The content of a config.json as attributes, as vLLM has it; the objects in it are not copied."""
    owner = SimpleNamespace(**config)
    if isinstance(text := config.get("text_config"), dict):
        owner.text_config = SimpleNamespace(**text)
    return owner


def repeat_scales(weights: Iterable[tuple[str, Any]], hf_config: Any) -> Iterator[tuple[str, Any]]:
    """The weights, with scales and zero points repeated if `apply_regrouping` changed the configuration.

    Args:
        weights: names and torch tensors, as loaded from files.
        hf_config: the model's configuration.

    Raises:
        ConfigurationError: a scale does not have two dimensions.
    """
    request = getattr(hf_config, _ATTRIBUTE, None)
    if request is None:
        yield from weights
        return
    method, times = request
    endings, dimension = _PLACES[method]
    for name, tensor in weights:
        if name.endswith(endings):
            if tensor.dim() != 2:
                raise ConfigurationError(
                    f"the scale {name} has {tensor.dim()} dimensions, and only those of single matrices can be "
                    f"repeated; use a checkpoint with smaller quantization groups, or serve it without {FLAG}"
                )
            tensor = tensor.repeat_interleave(times, dimension)
        yield name, tensor


_SCALES_BY_ROW = ((".scales", ".qzeros"), 0)
_PLACES: dict[str, tuple[tuple[str, ...], int]] = {
    "gptq": _SCALES_BY_ROW,
    "awq": _SCALES_BY_ROW,
    "auto-round": _SCALES_BY_ROW,
    "compressed-tensors": ((".weight_scale", ".weight_zero_point"), 1),
}
"""For each format: suffixes of the names of scales and zero points, and the dimension of the groups."""


class _Attributes(Mapping[str, Any]):
    """vLLM's configuration of a model as a mapping like the content of its config.json."""

    def __init__(self, hf_config: Any, text_config: Any) -> None:
        self._of = hf_config
        self._text = None if text_config is hf_config else _Attributes(text_config, text_config)

    def __getitem__(self, key: str) -> Any:
        if key == "text_config" and self._text is not None:
            return self._text
        try:
            return getattr(self._of, key)
        except AttributeError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self._of))

    def __len__(self) -> int:
        return len(vars(self._of))


def _drafts_of_the_same_weights(vllm_config: Any, described: Mapping[str, Any], group_size: int) -> list[Any]:
    """The configuration of the draft model, if it is loaded from the served model's files, and so has the same groups.

    Raises:
        ConfigurationError: it is loaded from other files, is quantized, and may get the served model's groups.
    """
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    served = vllm_config.model_config
    if draft is None or draft.hf_config is served.hf_config:
        return []
    its = _description(draft.hf_config)
    alike = its is None or (its["quant_method"] == described["quant_method"] and _group_size(its) == group_size)
    if alike and draft.model in (served.model, getattr(served, "model_weights", None)):
        return [draft.hf_config]
    # With the method "draft_model", the draft model always has its own groups.
    if its is not None and getattr(speculative, "method", None) != "draft_model":
        raise ConfigurationError(
            f"the draft model {draft.model} is quantized, and vLLM may use the smaller groups of {served.model} for "
            f"it; use a draft model that is not quantized, leave --speculative-config out, or serve it without {FLAG}"
        )
    return []


def _description(hf_config: Any) -> MutableMapping[str, Any] | None:
    """The model's quantization config, from where vLLM reads it; None for a method without groups to repeat."""
    for owner, name in (
        (hf_config, "quantization_config"),
        (getattr(hf_config, "text_config", None), "quantization_config"),
        (hf_config, "compression_config"),
    ):
        found = getattr(owner, name, None)
        if isinstance(found, MutableMapping):
            method = found.get("quant_method")
            return found if isinstance(method, str) and method in _PLACES else None
    return None


def _group_size(described: MutableMapping[str, Any]) -> int | None:
    """The (largest) group size of integer weights; None for all others."""
    if described["quant_method"] != "compressed-tensors":
        size = described.get("group_size", described.get("q_group_size"))
        return size if isinstance(size, int) and described.get("data_type", "int") == "int" else None
    if described.get("format") != "pack-quantized":
        return None
    sizes = [each.get("group_size") for each in _weights_of(described) if each.get("strategy") == "group"]
    return max((size for size in sizes if isinstance(size, int)), default=None)


def _weights_of(described: MutableMapping[str, Any]) -> list[MutableMapping[str, Any]]:
    weights = [group.get("weights") for group in _objects(described, "config_groups")]
    return [each for each in weights if isinstance(each, MutableMapping) and each]


def _rules_of(described: MutableMapping[str, Any]) -> list[MutableMapping[str, Any]]:
    """Overrides of the quantization config for single layers."""
    return _objects(described, "dynamic") + _objects(described, "extra_config")


def _objects(described: MutableMapping[str, Any], key: str) -> list[MutableMapping[str, Any]]:
    """The objects under a key. Anything else is skipped: vLLM reports it."""
    found = described.get(key)
    return [each for each in found.values() if isinstance(each, MutableMapping)] if isinstance(found, Mapping) else []


def _obstacle(described: MutableMapping[str, Any], group_size: int, smaller: int, load_format: Any) -> str | None:
    """Why scales of this model cannot be repeated for smaller groups; None if they can."""
    if smaller not in GROUP_SIZES:
        return f"groups of {smaller} would be aligned, but Marlin has no kernel for them"
    load_format = str(getattr(load_format, "value", load_format))
    if load_format not in _LOADERS:
        return f"repeating their scales does not work with --load-format {load_format}"
    if not all(state_of(patch) in ("ready", "applied") for patch in all_patches() if patch.name == _PATCH):
        return "repeating their scales does not work with this version of vLLM"
    return _obstacle_in_format(described, group_size)


def _obstacle_in_format(described: MutableMapping[str, Any], group_size: int) -> str | None:
    method = described["quant_method"]
    if method == "compressed-tensors":
        for weights in _weights_of(described):
            if weights.get("strategy") != "group" or weights.get("group_size") != group_size:
                return "its layers are quantized in different ways"
            if weights.get("actorder") in ("group", "dynamic", True):
                return "its groups are not contiguous (actorder)"
        return None
    if described.get("desc_act"):
        return "its groups are not contiguous (desc_act)"
    for rule in _rules_of(described):
        bits = rule.get("bits")
        if rule.get("group_size", group_size) != group_size and not (isinstance(bits, int) and bits >= 16):
            return "its layers are quantized in different ways"
    return None


def _set_group_size(described: MutableMapping[str, Any], group_size: int) -> None:
    if described["quant_method"] == "compressed-tensors":
        for weights in _weights_of(described):
            weights["group_size"] = group_size
        return
    for name in ("group_size", "q_group_size"):
        if name in described:
            described[name] = group_size
    for rule in _rules_of(described):
        if "group_size" in rule:
            rule["group_size"] = group_size
