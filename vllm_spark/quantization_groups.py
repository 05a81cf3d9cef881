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

from vllm_spark.config import FLAG
from vllm_spark.errors import ConfigurationError
from vllm_spark.patches import all_patches, state_of

logger = logging.getLogger("vllm_spark")

GROUP_SIZES = (32, 64, 128)
"""That vLLM has kernels for."""

_ATTRIBUTE = "spark_repeated_scales"
_PATCH = "repeated-scales"
_EXPERTS = "moe_intermediate_size"
_LOADERS = frozenset({"auto", "hf", "safetensors", "fastsafetensors", "mistral", "npcache", "pt", "dummy"})
"""Load formats of the loader whose weights are repeated, and the one that has none."""


@dataclass(frozen=True)
class Straddling:
    """A width that the ranks share in parts which are no whole number of groups."""

    name: str
    size: int
    ranks: int
    group_size: int

    @property
    def part(self) -> int:
        """Of one rank."""
        return self.size // self.ranks

    def sentence(self) -> str:
        """What is the matter, to be followed by what is done about it."""
        return (
            f"{self.name} is {self.size}, and a rank's {self.part} are no whole number "
            f"of quantization groups of {self.group_size}"
        )


def repeat_where_groups_straddle(vllm_config: Any, ranks: int) -> None:
    """Makes vLLM's configuration one with smaller groups, if the model's own do not fit into a rank's part.

    The weights follow when they are loaded (`repeated`).

    Raises:
        ConfigurationError: they do not fit, and nothing helps; the sentence names width, group and a remedy.
    """
    model_config = vllm_config.model_config
    described = _description(model_config.hf_config)
    group_size = None if described is None else _group_size(described)
    if described is None or group_size is None or group_size <= 0:
        return
    found = straddling(
        model_config.hf_text_config, group_size, ranks, vllm_config.parallel_config.enable_expert_parallel
    )
    if not found:
        return
    smaller = math.gcd(group_size, *(each.part for each in found))
    # Of several, the one that no repetition would help.
    worst = min(found, key=lambda each: math.gcd(group_size, each.part))
    if reason := _obstacle(described, group_size, smaller, vllm_config.load_config.load_format):
        if described["quant_method"] != "compressed-tensors" and all(each.name == _EXPERTS for each in found):
            return  # vLLM has a kernel for these, a slow one
        remedy = f"use a checkpoint with groups of {smaller}" if smaller in GROUP_SIZES else "use another checkpoint"
        raise ConfigurationError(f"{worst.sentence()} ({reason}); {remedy}, or serve it without {FLAG}")
    _set_group_size(described, smaller)
    setattr(model_config.hf_config, _ATTRIBUTE, [str(described["quant_method"]), group_size // smaller])
    vllm_config.quant_config = type(vllm_config).get_quantization_config(model_config, vllm_config.load_config)
    logger.info(
        "%s: their scales are repeated, so that each stands for %d weights; every weight keeps its value.",
        worst.sentence(),
        smaller,
    )


def straddling(text_config: Any, group_size: int, ranks: int, expert_parallel: bool) -> list[Straddling]:
    """The widths of a model whose parts are no whole number of groups.

    Args:
        text_config: the language model's configuration.
        group_size: weights that share a scale.
        ranks: among which a width is divided.
        expert_parallel: experts are not divided, but distributed.
    """
    size = _sizes(text_config)
    heads = size("num_attention_heads") * (size("v_head_dim") or size("head_dim"))
    widths = {
        **{name: size(name) for name in ("intermediate_size", "shared_expert_intermediate_size")},
        "the width of the shared experts": size("moe_intermediate_size") * size("n_shared_experts"),
        "the width of the attention heads": heads or size("hidden_size"),
        "the width of the linear attention heads": size("linear_num_value_heads") * size("linear_value_head_dim"),
    }
    if not expert_parallel:
        widths[_EXPERTS] = size(_EXPERTS)
    return [
        Straddling(name, width, ranks, group_size)
        for name, width in widths.items()
        # A width that is no whole number of groups itself is that of layers which are not quantized.
        if width > group_size and width % group_size == width % ranks == 0 and width // ranks % group_size
    ]


def with_groups_that_fit(config: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """A config.json with the groups that `repeat_where_groups_straddle` gives its model; else a plain copy.

    Args:
        config: the content of config.json.
        ranks: that share the model.
    """
    fitting = copy.deepcopy(dict(config))
    text = fitting.get("text_config")
    owner = SimpleNamespace(**fitting)
    if isinstance(text, dict):
        owner.text_config = SimpleNamespace(**text)
    described = _description(owner)
    group_size = None if described is None else _group_size(described)
    if described is None or group_size is None or group_size <= 0:
        return fitting
    sizes = owner.text_config if isinstance(text, dict) else owner
    smaller = math.gcd(group_size, *(each.part for each in straddling(sizes, group_size, ranks, False)))
    if smaller != group_size and smaller in GROUP_SIZES and _obstacle_in_format(described, group_size) is None:
        _set_group_size(described, smaller)
    return fitting


def repeated(weights: Iterable[tuple[str, Any]], hf_config: Any) -> Iterator[tuple[str, Any]]:
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


def _sizes(text_config: Any) -> Any:
    def size(name: str) -> int:
        value = getattr(text_config, name, None)
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    return size


def _description(hf_config: Any) -> MutableMapping[str, Any] | None:
    """What the model says of its quantization; where vLLM looks for it."""
    for owner, name in (
        (hf_config, "quantization_config"),
        (getattr(hf_config, "text_config", None), "quantization_config"),
        (hf_config, "compression_config"),
    ):
        found = getattr(owner, name, None)
        if isinstance(found, MutableMapping):
            return found if found.get("quant_method") in _PLACES else None
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
    groups = described.get("config_groups") or {}
    return [group["weights"] for group in groups.values() if group.get("weights")]


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
    rules = [*(described.get("dynamic") or {}).values(), *(described.get("extra_config") or {}).values()]
    if any(rule.get("group_size", group_size) != group_size and rule.get("bits", 4) < 16 for rule in rules):
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
    rules = [*(described.get("dynamic") or {}).values(), *(described.get("extra_config") or {}).values()]
    for rule in rules:
        if "group_size" in rule:
            rule["group_size"] = group_size
