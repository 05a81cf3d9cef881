"""How the weights of a model's layers are stored, from the `quantization_config` of its config.json.

There are five formats in which a checkpoint lists its unquantized layers; each is read as vLLM 0.33 reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vllm_spark.errors import ConfigurationError
from vllm_spark.models.config_values import block, names, section


@dataclass(frozen=True)
class Int4:
    """4-bit integers with one scale for each group (-1: for each column), and with AWQ a zero point."""

    group_size: int
    zero_points: bool = False


@dataclass(frozen=True)
class Int8:
    """8-bit integers with 16-bit activations, and one scale for each group (-1: for each column)."""

    group_size: int


@dataclass(frozen=True)
class Fp8Block:
    """fp8 weights and activations, with one scale for each block of (columns, rows)."""

    block: tuple[int, int] = (128, 128)


@dataclass(frozen=True)
class Fp8Channel:
    """fp8 weights and activations, with one scale for each channel or for the whole tensor."""


@dataclass(frozen=True)
class Mxfp4:
    """4-bit floats with one scale for each 32 of them."""


@dataclass(frozen=True)
class Nvfp4:
    """4-bit floats with one fp8 scale for each 16 of them, and one for the tensor."""


@dataclass(frozen=True)
class Bf16:
    """Not quantized."""


Weights = Int4 | Int8 | Fp8Block | Fp8Channel | Mxfp4 | Nvfp4 | Bf16


@dataclass(frozen=True)
class LayerName:
    """The names of a layer.

    Attributes:
        fused: vLLM's names for it; a nested model has several spellings.
        parts: for each of those, the names in the checkpoint that vLLM fuses into it.
        experts: whether it is a whole block of experts.
    """

    fused: tuple[str, ...]
    parts: tuple[tuple[str, ...], ...]
    experts: bool = False


Reader = Callable[[LayerName], Weights]
"""Returns how the weights of a layer are stored."""


def weights_reader(config: Mapping[str, Any]) -> tuple[Reader, str | None]:
    """The function that returns a layer's weights, and the method's name (None for an unquantized model).

    Args:
        config: the whole config.json.

    Raises:
        ConfigurationError: a method, or a number of bits, that is not supported.
    """
    quantization = quantization_of(config)
    if not quantization:
        return (lambda name: Bf16()), None
    if not isinstance(quantization, Mapping):
        raise ConfigurationError(f"quantization_config is {quantization!r}; config.json must hold an object there")
    method = str(quantization.get("quant_method", "")).lower()
    readers: dict[str, Callable[[Mapping[str, Any]], Reader]] = {
        "gptq": _gptq,
        "awq": _awq,
        "compressed-tensors": _compressed_tensors,
        "auto-round": _auto_round,
        "intel/auto-round": _auto_round,
        "inc": _auto_round,
        "fp8": _fp8,
        "mxfp4": _mxfp4,
        "modelopt": _modelopt,
        "modelopt_fp4": _modelopt,
    }
    if method not in readers:
        known = ", ".join(sorted(readers))
        raise ConfigurationError(
            f"weights quantized by {method or 'an unnamed method'!r} are not supported; supported are {known}"
        )
    return readers[method](quantization), method


OTHER_QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Other files that describe the quantization in some checkpoints: of ModelOpt, GPTQ and AWQ."""


def check_quantization_is_in_config(config: Mapping[str, Any], folder: Path) -> None:
    """Refuses a model whose quantization is described in another file: it would be tuned as an unquantized model.

    Args:
        config: the content of config.json.
        folder: where that is.

    Raises:
        ConfigurationError: there is such a file, and config.json does not describe a quantization.
    """
    if quantization_of(config):
        return
    for name in OTHER_QUANTIZATION_FILES:
        with suppress(OSError):  # what cannot be read is not there
            if (folder / name).is_file():
                raise ConfigurationError(
                    f"{folder / name} may say how the weights are quantized, and only config.json is read here; "
                    "describe it there, as quantization_config, or remove that file"
                )


def quantization_of(config: Mapping[str, Any]) -> Any:
    """The quantization config in a config.json, from where vLLM reads it; None if there is none."""
    found = config.get("quantization_config")
    if found is None and isinstance(text := config.get("text_config"), Mapping):
        found = text.get("quantization_config")
    if found is None and isinstance(compression := config.get("compression_config"), Mapping):
        found = compression
    return found


def _gptq(config: Mapping[str, Any]) -> Reader:
    base = _integers(_number(config, "bits", "gptq"), _group(config), zero_points=not config.get("sym", True))
    dynamic = section(config, "dynamic")
    only = names(config, "modules_in_block_to_quantize")

    def read(name: LayerName) -> Weights:
        if only and not name.experts and not _any_part(name, lambda part: any(word in part for word in only)):
            return Bf16()
        for pattern in dynamic:
            if not any(_regex_match(pattern[2:] if pattern[:2] in ("-:", "+:") else pattern, f) for f in name.fused):
                continue
            if pattern.startswith("-:"):
                return Bf16()
            merged = {**config, **section(dynamic, pattern)}
            return _integers(_number(merged, "bits", "gptq"), _group(merged), zero_points=not merged.get("sym", True))
        return base

    return read


def _awq(config: Mapping[str, Any]) -> Reader:
    bits = _number({"bits": 4, **config, **({"bits": config["w_bit"]} if "w_bit" in config else {})}, "bits", "awq")
    group = _group(config if "group_size" in config else {"group_size": config.get("q_group_size", -1)})
    zero_points = bool(config.get("zero_point", True))
    alone = names(config, "modules_to_not_convert")
    weights = _integers(bits, group, zero_points=zero_points)
    return lambda name: Bf16() if _any_part(name, lambda part: any(word in part for word in alone)) else weights


def _fp8(config: Mapping[str, Any]) -> Reader:
    widths = block(config, "weight_block_size")
    weights: Weights = Fp8Channel() if widths is None else Fp8Block(widths)
    alone = names(config, "modules_to_not_convert", "ignored_layers")

    def read(name: LayerName) -> Weights:
        if name.experts:
            among = [entry for entry in alone if "experts" in entry]
            return Bf16() if any(fused in entry for fused in name.fused for entry in among) else weights
        return Bf16() if _any_part(name, lambda part: part in alone) else weights

    return read


def _modelopt(config: Mapping[str, Any]) -> Reader:
    formats: Mapping[str, Weights] = {"NVFP4": Nvfp4(), "FP8": Fp8Channel()}
    algorithm = str(config.get("quant_algo"))
    if algorithm not in formats:
        raise ConfigurationError(
            f"weights quantized by ModelOpt as {algorithm} are not supported; supported are {', '.join(formats)}"
        )
    alone = names(config, "ignore", "exclude_modules")

    def matches(part: str) -> bool:
        return any(fnmatchcase(part, pattern) or part.startswith(f"{pattern}.") for pattern in alone)

    return lambda name: Bf16() if _all_parts(name, matches) else formats[algorithm]


def _mxfp4(config: Mapping[str, Any]) -> Reader:
    return lambda name: Mxfp4() if name.experts else Bf16()


def _auto_round(config: Mapping[str, Any]) -> Reader:
    extra = section(config, "extra_config")
    listed = config.get("block_name_to_quantize") or config.get("to_quant_block_names")
    if isinstance(listed, str):
        listed = [name.strip() for name in listed.split(",")]
    blocks = names({"block_name_to_quantize": listed}, "block_name_to_quantize")

    def of(entry: Mapping[str, Any]) -> Weights:
        merged = {**config, **entry}
        bits = _number(merged, "bits", "auto-round")
        return Bf16() if bits >= 16 else _integers(bits, _group(merged), zero_points=not merged.get("sym", True))

    def entry_of(part: str) -> Mapping[str, Any] | None:
        for key in extra:
            regex = any(letter in key for letter in "*+?^$()[]{}|\\")
            if key == part or part.endswith(f".{key}") or (regex and _regex_search(key, part)):
                return section(extra, key)
        return None

    def read(name: LayerName) -> Weights:
        for fused, parts in zip(name.fused, name.parts, strict=True):
            if name.experts:
                inside = next((key for key in extra if key.startswith(fused)), None)
                if inside is not None:
                    return of(section(extra, inside))
            for part in (fused, *parts):
                if (entry := entry_of(part)) is not None:
                    return of(entry)
        if blocks and not any(fused.startswith(tuple(blocks)) for fused in name.fused):
            return Bf16()
        return of({})

    return read


def _compressed_tensors(config: Mapping[str, Any]) -> Reader:
    described = section(config, "config_groups")
    groups = [section(described, name) for name in described]
    ignore = names(config, "ignore")
    if not groups:
        raise ConfigurationError("quantization_config of compressed-tensors has no config_groups; add them")
    kinds = [(names(group, "targets"), _compressed_group(group, config)) for group in groups]

    def matches(part: str, targets: list[str]) -> bool:
        return any(_regex_match(t[3:], part) if t.startswith("re:") else t == part for t in targets)

    def read(name: LayerName) -> Weights:
        if _all_parts(name, lambda part: matches(part, ignore)):
            return Bf16()
        for targets, weights in kinds:
            if _any_part(name, lambda part, targets=targets: matches(part, targets)):  # type: ignore[misc]
                return weights
        for targets, weights in kinds:
            if "Linear" in targets:
                return weights
        return Bf16()

    return read


def _compressed_group(group: Mapping[str, Any], config: Mapping[str, Any]) -> Weights:
    """How one group of compressed-tensors stores its weights."""
    weights = section(group, "weights")
    if not weights:
        raise ConfigurationError("a group of compressed-tensors does not describe its weights; add its weights")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    layout = str(group.get("format") or config.get("format") or "")
    if kind == "int" and not group.get("input_activations"):
        size = _group(weights) if strategy == "group" else -1
        return _integers(_number(weights, "num_bits", "compressed-tensors"), size, not weights.get("symmetric", True))
    if kind == "float" and bits == 8:
        widths = block(weights, "block_structure") if strategy == "block" else None
        return Fp8Channel() if widths is None else Fp8Block(widths)
    if kind == "float" and bits == 4 and "mxfp4" in layout:
        return Mxfp4()
    if kind == "float" and bits == 4 and "nvfp4" in layout:
        return Nvfp4()
    raise ConfigurationError(
        f"{layout or 'compressed-tensors'} with {bits} bits of type {kind!r} is not supported; "
        "supported are 4-bit and 8-bit integers with 16-bit activations, fp8, mxfp4 and nvfp4"
    )


def _integers(bits: int, group_size: int, zero_points: bool) -> Weights:
    if bits == 4:
        return Int4(group_size, zero_points)
    if bits == 8:
        return Int8(group_size)
    raise ConfigurationError(f"weights of {bits} bits are not supported; supported are 4 and 8 bits")


def _number(config: Mapping[str, Any], key: str, method: str) -> int:
    value = config.get(key)
    if type(value) is not int:
        raise ConfigurationError(f"{key} of {method} is {value!r} in quantization_config; it must be a whole number")
    return value


def _group(config: Mapping[str, Any]) -> int:
    value = config.get("group_size", -1)
    value = -1 if value in (None, 0) else value
    if type(value) is not int or value < -1:
        raise ConfigurationError(f"group_size is {value!r} in quantization_config; it must be a whole number, or -1")
    return value


def _any_part(name: LayerName, holds: Callable[[str], bool]) -> bool:
    return any(holds(part) for fused, parts in zip(name.fused, name.parts, strict=True) for part in (fused, *parts))


def _all_parts(name: LayerName, holds: Callable[[str], bool]) -> bool:
    return any(
        holds(fused) or all(holds(part) for part in parts) for fused, parts in zip(name.fused, name.parts, strict=True)
    )


def _regex_match(pattern: str, text: str) -> bool:
    return _compiled(pattern).match(text) is not None


def _regex_search(pattern: str, text: str) -> bool:
    return _compiled(pattern).search(text) is not None


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigurationError(
            f"{pattern!r} in quantization_config is not a regular expression ({error}); correct config.json"
        ) from None
