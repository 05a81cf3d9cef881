"""Writes the derived tables that come with this project: `python -m vllm_spark.tune.derive`.

Nothing has been measured on a GB10 yet, and without a measurement nothing justifies other parameters than vLLM's own
(docs/tuning.md). So every entry is vLLM's default, and its provenance says so. The tables list the shapes to tune.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_spark.files import configs_folder
from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.fused_moe import table as fused_moe_table
from vllm_spark.kernels.fused_moe.shapes import default_table
from vllm_spark.kernels.fused_moe.table import (
    FusedMoeProvenance,
    FusedMoeShape,
    load_fused_moe_provenance,
    store_fused_moe_table,
)
from vllm_spark.kernels.marlin import table as marlin_table
from vllm_spark.kernels.marlin.rules import block_size_m
from vllm_spark.kernels.marlin.table import MarlinRow, MarlinShape, MarlinTable, load_marlin_table, store_marlin_table
from vllm_spark.kernels.table import VLLM_DEFAULT, Provenance
from vllm_spark.models.layers import Experts, model_layers
from vllm_spark.tune.table_shapes import fused_moe_shape, marlin_shapes
from vllm_spark.tune.tuned_model import layers_as_served

ROWS = (1, 2, 4, 8)
"""Tokens of a decode step that tables are tuned for."""

SIZES = (1, 2)
"""Tensor-parallel sizes of a GB10 and of a pair."""

_DEFAULT = Provenance(kind="derived", rule=VLLM_DEFAULT)

_FP8_BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}
_FP8_CHANNEL = {"quant_method": "fp8"}
_FP8 = (
    # A model's folder, the way its FP8 version is stored, and at which sizes the pair's memory holds that. Left out are
    # shapes that vLLM 0.32 and later have tables for: 256 and 512 experts of width 512.
    ("qwen3-30b-a3b-int4", "Qwen3-30B-A3B-FP8", _FP8_BLOCK, (1, 2)),
    ("qwen3-coder-30b-a3b-int4", "Qwen3-Coder-30B-A3B-FP8", _FP8_BLOCK, (1, 2)),
    ("qwen3.5-35b-a3b-int4", "Qwen3.5-35B-A3B-FP8", _FP8_BLOCK, (2,)),
    ("qwen3-next-80b-a3b-int4", "Qwen3-Next-80B-A3B-FP8", _FP8_BLOCK, (2,)),
    ("qwen3-coder-next-int4", "Qwen3-Coder-Next-FP8", _FP8_BLOCK, (2,)),
    ("glm-4.5-air-int4", "GLM-4.5-Air-FP8", _FP8_CHANNEL, (2,)),
)


def write_tables(folder: Path) -> list[Path]:
    """Writes the derived tables into `folder` and returns their paths; keeps tables with other entries."""
    written = []
    for shape, models in _marlin_shapes().items():
        path = folder / marlin_table.FOLDER / shape.file_name(GB10.name)
        if not path.exists() or _is_all_default(load_marlin_table(path)):
            written.append(store_marlin_table(_marlin_table(shape, models), path.parent))
    for moe_shape, models in _fused_moe_shapes().items():
        path = folder / fused_moe_table.FOLDER / moe_shape.file_name(GB10.name)
        there = load_fused_moe_provenance(path)
        if there is None or there.is_all_default:
            table = default_table(moe_shape)
            provenance = FusedMoeProvenance(models=models, rows=dict.fromkeys(table.rows, _DEFAULT))
            written.append(store_fused_moe_table(moe_shape, GB10.name, table, provenance, path.parent))
    return written


def _is_all_default(table: MarlinTable) -> bool:
    return all(row.provenance == _DEFAULT for row in table.rows.values())


def shipped_models() -> Iterator[tuple[str, dict[str, Any]]]:
    """Folder's name and config.json of each model that comes with this project."""
    for folder in sorted((configs_folder() / "models").iterdir()):
        yield folder.name, json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _marlin_table(shape: MarlinShape, models: tuple[str, ...]) -> MarlinTable:
    rows = {
        tokens: MarlinRow(block_size_m=block_size_m(tokens, shape.top_k, shape.experts), provenance=_DEFAULT)
        for tokens in ROWS
    }
    return MarlinTable(device=GB10.name, shape=shape, models=models, rows=rows)


def _marlin_shapes() -> Mapping[MarlinShape, tuple[str, ...]]:
    """Experts' GEMMs of all models. Linear layers have no parameters but atomic adds, which vLLM leaves off."""
    found: dict[MarlinShape, tuple[str, ...]] = {}
    for name, config in shipped_models():
        for size in SIZES:
            for layer in layers_as_served(config, size):
                for shape in marlin_shapes(layer) if isinstance(layer, Experts) else ():
                    found[shape] = (*found.get(shape, ()), f"{name} TP={size}")
    return found


def _fused_moe_shapes() -> Mapping[FusedMoeShape, tuple[str, ...]]:
    configs = dict(shipped_models())
    found: dict[FusedMoeShape, tuple[str, ...]] = {}
    for folder, name, quantization, sizes in _FP8:
        for size in sizes:
            for layer in model_layers({**configs[folder], "quantization_config": quantization}, size):
                if isinstance(layer, Experts) and (shape := fused_moe_shape(layer)) is not None:
                    found[shape] = (*found.get(shape, ()), f"{name} TP={size}")
    return found


def main() -> None:
    """Writes the tables into `configs/`."""
    for path in write_tables(configs_folder()):
        print(path)


if __name__ == "__main__":
    main()
