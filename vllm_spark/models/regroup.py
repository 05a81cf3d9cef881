"""Quantized models whose groups of weights do not fit into halves: scales are repeated, so that each stands for fewer.

A matrix that is split along its input has a scale for each group of, say, 128 inputs. With 1408 inputs each rank has
704 of them, five and a half groups, which no kernel takes. Written twice, the same scale stands for two groups of 64,
and 704 is 11 of those. Every weight keeps its value, bit for bit. Scales are 6 % of the bytes then, not 3 %.
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
from vllm_spark.models.layers import Experts, model_layers
from vllm_spark.models.weights import Int4, Int8

logger = logging.getLogger("vllm_spark")

GROUP_SIZES = (32, 64, 128)
"""That vLLM has kernels for."""

_ATTRIBUTE = "spark_repeated_scales"
_PATCH = "repeated-scales"
_DIVIDED_INPUTS = frozenset({"o_proj", "out_proj", "down_proj"})
"""Linear layers that are divided along their input; all others are along their output, where no group is cut."""
_WIDTHS = {
    "mlp.down_proj": "intermediate_size",
    "mlp.shared_expert.down_proj": "shared_expert_intermediate_size",
}
"""Inputs of layers that have a name in config.json."""
_ALL_EXPERTS = frozenset({"mixtral", "phimoe", "granitemoe", "minimax_m2"})
"""Types of models whose `intermediate_size` is that of their experts, and whose layers all have some."""
_LOADERS = frozenset({"auto", "hf", "safetensors", "fastsafetensors", "mistral", "npcache", "pt", "dummy"})
"""Load formats of the loader whose weights are repeated, and the one that has none."""


@dataclass(frozen=True)
class MisalignedGroups:
    """A width that the ranks share in parts which are no whole number of groups.

    Attributes:
        name: of the width.
        size: of all ranks together.
        ranks: among which it is divided.
        group_size: weights that share a scale.
        experts: whether it is that of routed experts.
    """

    name: str
    size: int
    ranks: int
    group_size: int
    experts: bool = False

    @property
    def per_rank(self) -> int:
        """Of one rank."""
        return self.size // self.ranks

    def reason(self) -> str:
        """What is the matter, to be followed by what is done about it."""
        return (
            f"{self.name} is {self.size}, and a rank's {self.per_rank} are no whole number "
            f"of quantization groups of {self.group_size}"
        )


def apply_regrouping(vllm_config: Any, ranks: int) -> None:
    """Makes vLLM's configuration one with smaller groups, if the model's own do not fit into a rank's part.

    The weights follow when they are loaded (`repeat_scales`).

    Raises:
        ConfigurationError: they do not fit, and nothing helps; the sentence names width, group and a remedy.
    """
    model_config = vllm_config.model_config
    described = _description(model_config.hf_config)
    group_size = None if described is None else _group_size(described)
    if described is None or group_size is None or group_size <= 0:
        return
    config = _Attributes(model_config.hf_config, model_config.hf_text_config)
    found = misaligned_groups(config, group_size, ranks, vllm_config.parallel_config.enable_expert_parallel)
    if not found:
        return
    smaller = math.gcd(group_size, *(each.per_rank for each in found))
    # Of several, the one that no repetition would help.
    worst = min(found, key=lambda each: math.gcd(group_size, each.per_rank))
    if reason := _obstacle(described, group_size, smaller, vllm_config.load_config.load_format):
        if described["quant_method"] != "compressed-tensors" and all(each.experts for each in found):
            return  # vLLM has a kernel for these, a slow one
        remedy = f"use a checkpoint with groups of {smaller}" if smaller in GROUP_SIZES else "use another checkpoint"
        raise ConfigurationError(f"{worst.reason()} ({reason}); {remedy}, or serve it without {FLAG}")
    drafts = _drafts_of_the_same_weights(vllm_config, described, group_size)
    asked = [str(described["quant_method"]), group_size // smaller]
    for hf_config in (model_config.hf_config, *drafts):
        setattr(hf_config, _ATTRIBUTE, asked)
        if (its := _description(hf_config)) is not None:
            _set_group_size(its, smaller)
    vllm_config.quant_config = type(vllm_config).get_quantization_config(model_config, vllm_config.load_config)
    logger.info(
        "%s: their scales are repeated, so that each stands for %d weights; every weight keeps its value.",
        worst.reason(),
        smaller,
    )


def misaligned_groups(
    config: Mapping[str, Any], group_size: int, ranks: int, expert_parallel: bool
) -> list[MisalignedGroups]:
    """The widths of a model's quantized layers whose parts are no whole number of groups.

    Args:
        config: the content of config.json.
        group_size: weights that share a scale, where its layers do not say otherwise.
        ranks: among which a width is divided.
        expert_parallel: experts are not divided, but distributed.
    """
    try:
        widths = _widths_of_layers(config, ranks)
    except ConfigurationError:  # a model whose layers are not known here
        text = config.get("text_config")
        widths = _widths_of_numbers(text if isinstance(text, Mapping) else config, group_size, ranks)
    return [
        each
        for each in widths
        # A width that is no whole number of groups itself is that of layers which are not quantized.
        if each.size > each.group_size > 0
        and each.size % each.group_size == each.size % ranks == 0
        and each.per_rank % each.group_size
        and not (each.experts and expert_parallel)
    ]


def _widths_of_layers(config: Mapping[str, Any], ranks: int) -> list[MisalignedGroups]:
    """Of the layers that there are and that are quantized in groups."""
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
    """Of the layers that numbers in a config.json may stand for, quantized or not."""

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
    """Whether no layer has an MLP without experts, as far as config.json says so in one of the usual ways."""
    if not text.get("moe_intermediate_size"):
        return False
    if isinstance(types := text.get("mlp_layer_types"), list | tuple) and types:
        return all(each == "sparse" for each in types)
    if (step := text.get("decoder_sparse_step")) is not None:
        return bool(step == 1 and not text.get("mlp_only_layers"))
    return text.get("first_k_dense_replace") == 0 and text.get("moe_layer_freq", 1) == 1


def regrouped_config(config: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """A config.json with the groups that `apply_regrouping` gives its model; else a plain copy.

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
    text = fitting.get("text_config")
    owner = SimpleNamespace(**fitting)
    if isinstance(text, dict):
        owner.text_config = SimpleNamespace(**text)
    described = _description(owner)
    group_size = None if described is None else _group_size(described)
    if described is None or group_size is None or group_size <= 0:
        return fitting
    smaller = math.gcd(group_size, *(each.per_rank for each in misaligned_groups(fitting, group_size, ranks, False)))
    if smaller != group_size and smaller in GROUP_SIZES and _obstacle_in_format(described, group_size) is None:
        _set_group_size(described, smaller)
    return fitting


def repeat_scales(weights: Iterable[tuple[str, Any]], hf_config: Any) -> Iterator[tuple[str, Any]]:
    """Weights as they come from a file, those that are scales or zero points repeated if the configuration says so.

    Args:
        weights: names and torch tensors.
        hf_config: the model's configuration.

    Raises:
        ConfigurationError: a scale has a shape that is not known here.
    """
    asked = getattr(hf_config, _ATTRIBUTE, None)
    if asked is None:
        yield from weights
        return
    method, times = asked
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
"""For each format: how names of scales and zero points end, and the dimension in which groups are counted."""


class _Attributes(Mapping[str, Any]):
    """vLLM's configuration of a model, to be read like the content of its config.json."""

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
    """The configuration of the draft model, if it is read from the served model's own files; vLLM builds it alike.

    Raises:
        ConfigurationError: it is read from others, is quantized, and may be built with the served model's groups.
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
    # A draft model of the method that is called so has groups of its own in any case.
    if its is not None and getattr(speculative, "method", None) != "draft_model":
        raise ConfigurationError(
            f"the draft model {draft.model} is quantized, and may be given the smaller groups that halves of "
            f"{served.model} need; use a draft model that is not quantized, leave --speculative-config out, or serve "
            f"it without {FLAG}"
        )
    return []


def _description(hf_config: Any) -> MutableMapping[str, Any] | None:
    """What the model says of its quantization; where vLLM looks for it."""
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
    """The group size of whole-numbered weights; of several, the largest, for none may straddle. None: all others."""
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
    """What a checkpoint says of single layers."""
    return _objects(described, "dynamic") + _objects(described, "extra_config")


def _objects(described: MutableMapping[str, Any], key: str) -> list[MutableMapping[str, Any]]:
    """Those under a key. What is none is left to vLLM, which knows best what is wrong with it."""
    found = described.get(key)
    return [each for each in found.values() if isinstance(each, MutableMapping)] if isinstance(found, Mapping) else []


def _obstacle(described: MutableMapping[str, Any], group_size: int, smaller: int, load_format: Any) -> str | None:
    """Why scales of this model cannot be repeated for smaller groups; None if they can."""
    if smaller not in GROUP_SIZES:
        return f"groups of {smaller} would fit, and Marlin has no kernel for those"
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
                return "its groups are not of neighbours (actorder)"
        return None
    if described.get("desc_act"):
        return "its groups are not of neighbours (desc_act)"
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
