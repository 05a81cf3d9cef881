"""The quantized checkpoints of tests/models: what is written can be read back by the rules of its format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.formats import AWQ_ORDER, FORMATS, quantize_checkpoint
from tests.models.random_weights import WEIGHTS

ROUNDING = {"w8a8": 0.01, "w8a8_fp8": 0.04, "block_fp8": 0.04}
"""Relative error of the weights; of all other formats, which have 4 bits, 0.13."""

NAME = "model.layers.0.mlp.experts.0.up_proj"
EXPERTS = "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_restored_up_to_rounding(name: str) -> None:
    form = FORMATS[name]
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(3)) * 0.08
    restored = form.restore(form.quantize(weight))
    assert (restored - weight).norm() < ROUNDING.get(name, 0.13) * weight.norm()


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_keeps_what_is_not_quantized(name: str, tmp_path: Path) -> None:
    form = FORMATS[name]
    weights = {
        f"{NAME}.weight": torch.randn(256, 512),
        EXPERTS: torch.randn(2, 512, 256),
        "model.norm.weight": torch.ones(512),
        "lm_head.weight": torch.randn(64, 512),
    }
    save_file(weights, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "any"}))
    quantize_checkpoint(tmp_path, form)
    written = load_file(tmp_path / WEIGHTS)
    changed, kept = (EXPERTS, f"{NAME}.weight") if form.experts else (f"{NAME}.weight", EXPERTS)
    separator = "_" if form.experts else "."
    added = {f"{changed.removesuffix('.weight')}{separator}{part}" for part in form.quantize(weights[changed])}
    assert set(written) == (set(weights) - {changed}) | added
    assert torch.equal(written[kept], weights[kept])
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "model_type": "any",
        "quantization_config": form.config,
    }


def test_a_checkpoint_without_a_layer_to_quantize_is_refused(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.randn(64, 512)}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no layer that"):
        quantize_checkpoint(tmp_path, FORMATS["gptq"])


def test_int4_words_have_the_first_value_in_the_lowest_bits() -> None:
    """One weight of a group of 128 is its largest, the others are half of it, so the values are 15 and 12."""
    weight = torch.full((8, 128), 3.5)
    weight[:, 0] = 7.0
    parts = FORMATS["w4a16"].quantize(weight)
    first, second = parts["weight_packed"][0, :2].tolist()
    assert first & 0xFFFFFFFF == 0xCCCCCCCF
    assert second & 0xFFFFFFFF == 0xCCCCCCCC
    assert FORMATS["gptq"].quantize(weight)["qweight"][0, 0] == first


def test_awq_words_have_their_columns_in_its_own_order() -> None:
    """Outputs 0 to 7 have the values 0, 2, 4 ... of a group whose zero is 0, in the word's places by `AWQ_ORDER`."""
    weight = torch.zeros(8, 128)
    weight[:, 1] = 15.0
    weight[:, 0] = torch.arange(8) * 2.0
    word = int(FORMATS["awq"].quantize(weight)["qweight"][0, 0]) & 0xFFFFFFFF
    assert [(word >> (4 * place)) & 15 for place in range(8)] == [2 * column for column in AWQ_ORDER]


def test_fp4_codes() -> None:
    """E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 are codes 0 to 7, negative ones 8 more; the first value is the lower half."""
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([6.0, -6.0, 0.5, 3.0])
    parts = FORMATS["mxfp4"].quantize(weight)
    assert parts["scales"].tolist() == [[127]]
    assert parts["blocks"][0, 0, :2].tolist() == [0xF7, 0x51]
