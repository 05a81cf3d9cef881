"""What serving uses for the experts of known models on a GB10, and why: for `vllm-spark tune --check`.

The models are those of `configs/models/`, with their versions in fp8, and those of `configs/experts.json`, which has
only the sizes of their experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_spark.errors import ConfigurationError
from vllm_spark.files import configs_folder
from vllm_spark.kernels import lookup
from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.fused_moe.published import sets_left_out
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, vllm_has_table
from vllm_spark.kernels.fused_moe.vllm_rows import effective_rows
from vllm_spark.kernels.marlin.table import MarlinShape
from vllm_spark.kernels.marlin.tile_choice import describe
from vllm_spark.kernels.table import origins
from vllm_spark.models.layers import Experts, model_layers
from vllm_spark.models.regroup import layers_as_served
from vllm_spark.models.weights import Bf16, Fp8Block, Fp8Channel, Int4, Mxfp4, Weights
from vllm_spark.tune.plan import not_read_by_default
from vllm_spark.tune.table_shapes import marlin_shapes
from vllm_spark.tune.tuned_model import TunedModel, fused_moe_shapes

SIZES = (1, 2)
"""Tensor parallel sizes of a GB10 and of a pair."""

_FP8_BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}
_FP8_CHANNEL = {"quant_method": "fp8"}
_FP8 = (
    # A folder of configs/models, and the name and the format of the model's version in fp8.
    ("qwen3-30b-a3b-int4", "Qwen3-30B-A3B-FP8", _FP8_BLOCK),
    ("qwen3-coder-30b-a3b-int4", "Qwen3-Coder-30B-A3B-FP8", _FP8_BLOCK),
    ("qwen3.5-35b-a3b-int4", "Qwen3.5-35B-A3B-FP8", _FP8_BLOCK),
    ("qwen3.5-122b-a10b-int4", "Qwen3.5-122B-A10B-FP8", _FP8_BLOCK),
    ("qwen3-next-80b-a3b-int4", "Qwen3-Next-80B-A3B-FP8", _FP8_BLOCK),
    ("qwen3-coder-next-int4", "Qwen3-Coder-Next-FP8", _FP8_BLOCK),
    ("glm-4.5-air-int4", "GLM-4.5-Air-FP8", _FP8_CHANNEL),
)

_WEIGHTS: Mapping[str, Weights] = {
    "bf16": Bf16(),
    "fp8 in blocks": Fp8Block((128, 128)),
    "fp8": Fp8Channel(),
    "int4 in groups of 32": Int4(32),
    "int4 in groups of 128": Int4(128),
    "mxfp4": Mxfp4(),
}
"""Formats of `configs/experts.json`. For others vLLM reads no table."""


@dataclass(frozen=True)
class Use:
    """What serving uses for one shape.

    Attributes:
        shape: for people.
        kernel: `Marlin` or `Triton`.
        models: whose layers have the shape on one rank, at which tensor parallel size.
        table: the file that is used; None for vLLM's choice.
        what: the tuned rows by origin, or vLLM's choice.
        why: the reason.
    """

    shape: str
    kernel: str
    models: tuple[str, ...]
    table: Path | None
    what: str
    why: str


def uses() -> list[Use]:
    """What serving uses on a GB10, with this user's tables and this project's, for each shape of the known models."""
    return uses_of(_known_experts())


def uses_of(labelled: Iterable[tuple[str, Experts | str]]) -> list[Use]:
    """The same for some models.

    Args:
        labelled: a label and the experts of one rank; a format's name, if vLLM has no tables for it.
    """
    marlin: dict[MarlinShape, list[str]] = {}
    triton: dict[FusedMoeExperts, list[str]] = {}
    without: dict[str, list[str]] = {}
    for label, layer in labelled:
        if isinstance(layer, str):
            without.setdefault(layer, []).append(label)
            continue
        if isinstance(layer.weights, (Int4, Mxfp4)):
            for shape in marlin_shapes(layer):
                _add(marlin, shape, label)
        for experts in _triton_shapes(label, layer):
            _add(triton, experts, label)
    found = [_of_marlin(shape, models) for shape, models in marlin.items()]
    for experts, models in triton.items():
        use = _of_triton(experts, models)
        # Int4 experts run on Marlin by default. A shape without a table on Triton is not worth a line.
        if not experts.is_int4 or use.table is not None:
            found.append(use)
    reason = "vLLM reads no table for such weights"
    return found + [
        Use(f"experts in {kind}", "FlashInfer, Marlin", tuple(models), None, _VLLM_CHOICE, reason)
        for kind, models in without.items()
    ]


_VLLM_CHOICE = "vLLM's choice"
_NOT_PUBLISHED = "no measurement on a GB10 is published; vllm-spark tune measures on yours"


def _of_marlin(shape: MarlinShape, models: Iterable[str]) -> Use:
    found = lookup.find_marlin_table(GB10.name, shape)
    words = (describe(shape), "Marlin", tuple(models))
    if found is not None and found[1].effective_rows:
        path, table = found
        rows = origins(table.rows[tokens].provenance for tokens in table.effective_rows)
        return Use(*words, path, rows, f"a table in {path.parent}")
    why = _NOT_PUBLISHED
    if shape.quant_type == "float4_e2m1f":
        why = "no measurement on a GB10 is published, and vllm-spark tune does not search MXFP4"
    return Use(*words, None, _VLLM_CHOICE, why)


def _of_triton(shape: FusedMoeExperts, models: Iterable[str]) -> Use:
    table = shape.table
    found = lookup.find_fused_moe_table(GB10.name, table.experts, table.size_n, table.dtype, table.block_shape)
    words = (shape.describe(), "Triton", tuple(models))
    condition = not_read_by_default(shape)
    only = "" if condition is None else f"; with --moe-backend triton only, since {condition}"
    if found is not None and found[2].group_size in (None, shape.group_size):
        path, rows, provenance = found
        effective = effective_rows(rows, provenance, table, GB10.name)
        if effective:
            tuned = origins(provenance.rows.get(tokens) for tokens in effective)
            measured = provenance.hidden
            other = "" if measured in (None, shape.hidden) else f", measured with a model width of {measured}"
            return Use(*words, path, tuned, f"a table in {path.parent}{other}{only}")
    what = "the table that comes with vLLM" if vllm_has_table(shape, GB10.name) else _VLLM_CHOICE
    left_out = [each for each in sets_left_out(configs_folder()) if each.shape == table]
    why = "; ".join(f"{each.source} (grade {each.grade}) is left out: {each.reason}" for each in left_out)
    return Use(*words, None, what, (why or _NOT_PUBLISHED) + only)


def _triton_shapes(label: str, layer: Experts) -> list[FusedMoeExperts]:
    """The shape on Triton; none if vLLM's kernel refuses it."""
    try:
        return fused_moe_shapes(TunedModel(label, 1, [layer]), int4=True)
    except ConfigurationError:
        return []  # groups or blocks that do not divide a rank's widths


def _add(found: dict[Any, list[str]], shape: Any, label: str) -> None:
    if label not in found.setdefault(shape, []):
        found[shape].append(label)


def _known_experts() -> Iterator[tuple[str, Experts | str]]:
    """A label and the experts of one rank, for each model, format and size; a format's name, if it has no tables."""
    configs = {
        folder.name: json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for folder in sorted((configs_folder() / "models").iterdir())
    }
    for size in SIZES:
        for name, config in configs.items():
            for layer in layers_as_served(config, size):
                if isinstance(layer, Experts):
                    yield f"{name} TP={size}", layer
        for folder, name, quantization in _FP8:
            for layer in model_layers({**configs[folder], "quantization_config": quantization}, size):
                if isinstance(layer, Experts):
                    yield f"{name} TP={size}", layer
    for entry in json.loads((configs_folder() / "experts.json").read_text(encoding="utf-8"))["models"]:
        for version in entry["versions"]:
            weights = _WEIGHTS.get(version["format"])
            for size in version["tp"]:
                label = f"{entry['name']} {version['format']} TP={size}"
                if weights is None:
                    yield label, version["format"]
                    continue
                yield (
                    label,
                    Experts(
                        name="mlp.experts",
                        experts=entry["experts"],
                        top_k=entry["top_k"],
                        hidden=entry["hidden"],
                        intermediate=entry["intermediate"] // size,
                        count=1,
                        weights=weights,
                    ),
                )
