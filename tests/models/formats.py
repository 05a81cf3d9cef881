"""Quantized formats: a bfloat16 checkpoint is rounded to each of them, in the layout of published checkpoints.

Weights are rounded to the nearest value, so a quantized model computes nearly what the original computes. `restored`
reads a quantized layer back by the rules of its format, for the test of these writers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .random_weights import WEIGHTS

Weights = dict[str, torch.Tensor]

GROUP = 128
"""Weights that share a scale in the INT4 formats."""
BLOCK = 128
"""Rows and columns of the blocks of block FP8."""
NVFP4_GROUP, MXFP4_GROUP = 16, 32
FP8_MAX, FP4_MAX = 448.0, 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST_WEIGHT, LARGEST_INPUT = 1.0, 16.0
"""Of layers in NVFP4: one scale for all, since layers that vLLM joins must have the same."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Columns of the eight INT4 values of a word of AWQ, lowest bits first."""

NOT_QUANTIZED = ["lm_head", "re:.*mlp.gate$"]


@dataclass(frozen=True)
class Format:
    """A quantized format.

    Attributes:
        label: what the table calls it.
        config: `quantization_config` of `config.json`.
        quantize: the tensors of a layer, by the end of their names, from its weight (outputs, inputs) in float32.
        restore: the inverse, up to rounding.
        experts: whether it quantizes the joined experts of gpt-oss instead of the layers that are called `*_proj`.
    """

    label: str
    config: dict[str, Any]
    quantize: Callable[[torch.Tensor], Weights]
    restore: Callable[[Weights], torch.Tensor]
    experts: bool = False


def quantize_checkpoint(folder: Path, form: Format) -> Path:
    """Changes the bfloat16 checkpoint in `folder` to the format, in place.

    Raises:
        ValueError: it has no layer to quantize.
    """
    weights: Weights = {}
    quantized = 0
    for name, value in load_file(folder / WEIGHTS).items():
        if not is_quantized(name, value, form):
            weights[name] = value
            continue
        quantized += 1
        if form.experts:  # (experts, inputs, outputs)
            parts = form.quantize(value.float().transpose(1, 2))
            weights |= {f"{name}_{part}": tensor.contiguous() for part, tensor in parts.items()}
        else:
            parts = form.quantize(value.float())
            weights |= {f"{name.removesuffix('weight')}{part}": tensor.contiguous() for part, tensor in parts.items()}
    if not quantized:
        raise ValueError(f"the checkpoint in {folder} has no layer that {form.label} quantizes")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = form.config
    file.write_text(json.dumps(config, indent=2))
    return folder


def is_quantized(name: str, value: torch.Tensor, form: Format) -> bool:
    """Whether the format has other tensors in place of this one."""
    if form.experts:
        return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
    return name.endswith("_proj.weight") and value.dim() == 2


def _packed(values: torch.Tensor) -> torch.Tensor:
    """Eight integers of four bits in a word, along the last dimension, the first one in the lowest bits."""
    words = values.to(torch.int64).unflatten(-1, (-1, 8))
    word = sum(words[..., place] << (4 * place) for place in range(8))
    assert isinstance(word, torch.Tensor)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    word = words.to(torch.int64) & 0xFFFFFFFF
    return torch.stack([(word >> (4 * place)) & 15 for place in range(8)], dim=-1).flatten(-2)


def _grouped(weight: torch.Tensor, size: int) -> torch.Tensor:
    return weight.unflatten(-1, (-1, size))


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers from 0 to 15, whose zero is 8, and a scale for each group of inputs."""
    groups = _grouped(weight, GROUP)
    scale = (groups.abs().amax(-1) / 7).to(torch.float16)
    values = (groups / scale.float()[..., None]).round().clamp(-8, 7) + 8
    return values.flatten(-2), scale


def _gptq(weight: torch.Tensor) -> Weights:
    values, scale = _int4(weight)
    outputs, inputs = weight.shape
    # The format stores the zero minus one.
    zeros = torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32)
    order = (torch.arange(inputs) // GROUP).to(torch.int32)
    return {"qweight": _packed(values).T, "qzeros": zeros, "scales": scale.T, "g_idx": order}


def _restored_gptq(parts: Weights) -> torch.Tensor:
    values = _unpacked(parts["qweight"].T) - 8
    return (_grouped(values.float(), GROUP) * parts["scales"].T.float()[..., None]).flatten(-2)


def _awq(weight: torch.Tensor) -> Weights:
    """With zeros that differ: each group's values reach from its smallest to its largest weight."""
    groups = _grouped(weight, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).to(torch.float16)
    zero = (-low / scale.float()).round().clamp(0, 15)
    values = ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15).flatten(-2)
    return {"qweight": _packed_awq(values.T), "qzeros": _packed_awq(zero.T), "scales": scale.T}


def _packed_awq(values: torch.Tensor) -> torch.Tensor:
    return _packed(values.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2))


def _restored_awq(parts: Weights) -> torch.Tensor:
    def columns(words: torch.Tensor) -> torch.Tensor:
        eights = _unpacked(words).unflatten(-1, (-1, 8))
        return eights[..., [AWQ_ORDER.index(place) for place in range(8)]].flatten(-2).T.float()

    values, zeros = columns(parts["qweight"]), columns(parts["qzeros"])
    return ((_grouped(values, GROUP) - zeros[..., None]) * parts["scales"].T.float()[..., None]).flatten(-2)


def _packed_w4a16(weight: torch.Tensor) -> Weights:
    values, scale = _int4(weight)
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    return {"weight_packed": _packed(values), "weight_scale": scale.to(torch.bfloat16), "weight_shape": shape}


def _restored_w4a16(parts: Weights) -> torch.Tensor:
    values = _unpacked(parts["weight_packed"]) - 8
    return (_grouped(values.float(), GROUP) * parts["weight_scale"].float()[..., None]).flatten(-2)


def _int8(weight: torch.Tensor) -> Weights:
    scale = weight.abs().amax(-1, keepdim=True) / 127
    return {"weight": (weight / scale).round().clamp(-128, 127).to(torch.int8), "weight_scale": scale}


def _fp8(weight: torch.Tensor) -> Weights:
    scale = weight.abs().amax(-1, keepdim=True) / FP8_MAX
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def _restored_channels(parts: Weights) -> torch.Tensor:
    return parts["weight"].float() * parts["weight_scale"]


def _fp8_blocks(weight: torch.Tensor) -> Weights:
    blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)) / FP8_MAX
    values = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale_inv": scale}


def _restored_blocks(parts: Weights) -> torch.Tensor:
    scale = parts["weight_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return parts["weight"].float() * scale


def _fp4(values: torch.Tensor) -> torch.Tensor:
    """Two FP4 (E2M1) values in a byte, the first one in the lower half."""
    levels = torch.tensor(FP4_VALUES)
    bounds = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(values.abs().contiguous(), bounds) + 8 * (values < 0)
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def _restored_fp4(codes: torch.Tensor) -> torch.Tensor:
    values = torch.tensor(FP4_VALUES + tuple(-value for value in FP4_VALUES))
    return values[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()]


def _nvfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Codes, an FP8 scale for each group of 16 inputs, and the scale of these scales."""
    outer = LARGEST_WEIGHT / (FP8_MAX * FP4_MAX)
    groups = _grouped(weight, NVFP4_GROUP)
    scale = (groups.abs().amax(-1) / FP4_MAX / outer).to(torch.float8_e4m3fn)
    values = groups / (scale.float() * outer).clamp(min=1e-12)[..., None]
    return _fp4(values.flatten(-2)), scale, outer


def _modelopt(weight: torch.Tensor) -> Weights:
    codes, scale, outer = _nvfp4(weight)
    inputs = LARGEST_INPUT / (FP8_MAX * FP4_MAX)
    scales = {"weight_scale": scale, "weight_scale_2": torch.tensor(outer), "input_scale": torch.tensor(inputs)}
    return {"weight": codes} | scales


def _restored_modelopt(parts: Weights) -> torch.Tensor:
    scale = parts["weight_scale"].float() * parts["weight_scale_2"]
    return (_grouped(_restored_fp4(parts["weight"]), NVFP4_GROUP) * scale[..., None]).flatten(-2)


def _packed_nvfp4(weight: torch.Tensor) -> Weights:
    codes, scale, outer = _nvfp4(weight)
    inputs = LARGEST_INPUT / (FP8_MAX * FP4_MAX)
    inverse = {"weight_global_scale": torch.tensor([1 / outer]), "input_global_scale": torch.tensor([1 / inputs])}
    return {"weight_packed": codes, "weight_scale": scale} | inverse


def _restored_nvfp4(parts: Weights) -> torch.Tensor:
    scale = parts["weight_scale"].float() / parts["weight_global_scale"]
    return (_grouped(_restored_fp4(parts["weight_packed"]), NVFP4_GROUP) * scale[..., None]).flatten(-2)


def _mxfp4(weight: torch.Tensor) -> Weights:
    groups = _grouped(weight, MXFP4_GROUP)
    exponent = groups.abs().amax(-1).clamp(min=1e-30).log2().floor() - 2  # 6 is the largest value, 4 its power of two
    codes = _fp4((groups / exponent.exp2()[..., None]).clamp(-FP4_MAX, FP4_MAX).flatten(-2))
    return {"blocks": _grouped(codes, MXFP4_GROUP // 2), "scales": (exponent + 127).to(torch.uint8)}


def _restored_mxfp4(parts: Weights) -> torch.Tensor:
    scale = (parts["scales"].float() - 127).exp2()
    return (_restored_fp4(parts["blocks"]) * scale[..., None]).flatten(-2)


def _compressed(
    layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None, ignored: list[str] = NOT_QUANTIZED
) -> dict[str, Any]:
    """The configuration of compressed-tensors, with one group for all linear layers."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _scheme(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False} | more


_GPTQ_CONFIG = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}

FORMATS = {
    "gptq": Format(
        f"GPTQ INT4, groups of {GROUP}",
        {"quant_method": "gptq", "dynamic": {r"-:.*mlp\.gate$": {}}} | _GPTQ_CONFIG,
        _gptq,
        _restored_gptq,
    ),
    "awq": Format(
        f"AWQ INT4, groups of {GROUP}",
        {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True}
        | {"modules_to_not_convert": None},
        _awq,
        _restored_awq,
    ),
    "auto_round": Format(
        f"AutoRound INT4, groups of {GROUP}",
        {
            "quant_method": "auto-round",
            "bits": 4,
            "group_size": GROUP,
            "sym": True,
            "data_type": "int",
            "packing_format": "auto_round:auto_gptq",
            "autoround_version": "0.9.0",
            "block_name_to_quantize": "model.layers",
            "extra_config": {f"model.layers.{layer}.mlp.gate": {"bits": 16, "data_type": "fp"} for layer in range(2)},
        },
        _gptq,
        _restored_gptq,
    ),
    "w4a16": Format(
        "compressed-tensors W4A16",
        _compressed("pack-quantized", _scheme(4, "int", "group", group_size=GROUP), None),
        _packed_w4a16,
        _restored_w4a16,
    ),
    "w8a8": Format(
        "compressed-tensors W8A8, INT8",
        _compressed("int-quantized", _scheme(8, "int", "channel"), _scheme(8, "int", "token", dynamic=True)),
        _int8,
        _restored_channels,
    ),
    "w8a8_fp8": Format(
        "compressed-tensors W8A8, FP8",
        _compressed("float-quantized", _scheme(8, "float", "channel"), _scheme(8, "float", "token", dynamic=True)),
        _fp8,
        _restored_channels,
    ),
    "block_fp8": Format(
        f"FP8 in blocks of {BLOCK} x {BLOCK}",
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head"] + [f"model.layers.{layer}.mlp.gate" for layer in range(2)],
        },
        _fp8_blocks,
        _restored_blocks,
    ),
    "nvfp4": Format(
        "NVFP4, modelopt",
        {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "group_size": NVFP4_GROUP,
            "kv_cache_quant_algo": None,
            "ignore": ["lm_head"] + [f"model.layers.{layer}.mlp.gate" for layer in range(2)],
        },
        _modelopt,
        _restored_modelopt,
    ),
    "nvfp4_packed": Format(
        "NVFP4, compressed-tensors",
        _compressed(
            "nvfp4-pack-quantized",
            _scheme(4, "float", "tensor_group", group_size=NVFP4_GROUP),
            _scheme(4, "float", "tensor_group", group_size=NVFP4_GROUP, dynamic="local"),
        ),
        _packed_nvfp4,
        _restored_nvfp4,
    ),
    "mxfp4": Format(
        "MXFP4",
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
        _mxfp4,
        _restored_mxfp4,
        experts=True,
    ),
}
