"""The options and the plan of a tuning run, and checks that need neither a GPU nor vLLM.

They come before anything slow is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_spark.compat.versions import installed_vllm, triton_runs_int4_experts
from vllm_spark.errors import ConfigurationError
from vllm_spark.files import check_writable
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts
from vllm_spark.kernels.lookup import user_folder
from vllm_spark.models.config import read_model_config
from vllm_spark.models.regroup import layers_as_served, regrouped_config
from vllm_spark.models.shard import shard_as_model
from vllm_spark.models.weights import quantization_of
from vllm_spark.tune.results import Shape, tunable_rows
from vllm_spark.tune.tuned_model import Kernels, TunedModel, shapes_of

_NOTHING = {
    "auto": "it has no experts in int4 (Marlin), bfloat16 or fp8 (Triton); other kernels take no parameters, or, as "
    "for MXFP4, are not searched",
    "marlin": "none of its experts have int4 weights; Marlin's other kernels take no parameters, or, as for MXFP4, are "
    "not searched",
    "triton": "it has no experts in int4, bfloat16 or fp8, which are those that Triton's kernel takes",
}


LARGEST_ROWS = 8
"""Tokens of the largest step that gets an entry: larger batches are served well by vLLM's own rule."""


@dataclass(frozen=True)
class TuningOptions:
    """What is tuned, and how.

    Attributes:
        model: a folder or file with a config.json, or a model's name.
        tp: tensor parallel sizes.
        kernels: which kernels are tuned.
        rows: tokens of decode steps, in ascending order, up to `LARGEST_ROWS`.
        out: folder of the tables; None for the folder that serving reads (`lookup.user_folder`).
        decode: whether engines compare decode steps with and without the tables.
        rounds: engines that each side of that comparison decodes with.
        engine: further arguments of `vllm.LLM` for these engines.
        timeout: seconds for one engine.
        keep_logs: folder that keeps the engines' output; None to delete it.
        plot: image file that the times are drawn into; None for no plot.
    """

    model: str
    tp: tuple[int, ...] = (2,)
    kernels: Kernels = "auto"
    rows: tuple[int, ...] = tuple(range(1, LARGEST_ROWS + 1))
    out: Path | None = None
    decode: bool = True
    rounds: int = 4
    engine: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 900.0
    keep_logs: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class Plan:
    """The shapes that are tuned.

    Attributes:
        config: of the model.
        sizes: the model at each tensor parallel size, and its kernels' shapes.
        labels: for each shape, the models and sizes that have it.
    """

    config: dict[str, Any]
    sizes: list[tuple[TunedModel, list[Shape]]]
    labels: dict[Shape, list[str]]


def prepare(options: TuningOptions) -> tuple[Plan, Path]:
    """The plan and the folder of the tables; creates no file and no folder.

    Raises:
        ConfigurationError: the model is not known or has nothing to tune, a file or folder cannot be written, or no
            shard of the model can be made for the comparison of decode steps.
    """
    plan = make_plan(options.model, options.tp, options.kernels, options.rows)
    folder = options.out or user_folder()
    if folder is None:
        raise ConfigurationError("this user has no home folder for the tables; give a folder with --output")
    check_folder(folder, "--output")
    if options.plot is not None:
        from vllm_spark.bench.collective_report import check_plot

        check_plot(options.plot)
        check_writable(options.plot)
    if options.decode:
        if options.keep_logs is not None:
            check_folder(options.keep_logs, "--keep-logs")
        for model, _ in plan.sizes:  # found out now, not after the search
            shard_as_model(regrouped_config(plan.config, model.tp), model.tp)
    return plan, folder


def check_folder(folder: Path, option: str) -> None:
    """Raises ConfigurationError if `folder`, given by `option`, cannot be created or written."""
    try:
        parent = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    except OSError as error:
        raise ConfigurationError(
            f"the folder {folder} cannot be written ({error.strerror}); give another with {option}"
        ) from None
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what = "is protected" if parent.is_dir() else "is a file"
        raise ConfigurationError(f"the folder {folder} cannot be written: {parent} {what}; give another with {option}")


def make_plan(model: str, tp: Sequence[int], kernels: Kernels, rows: Sequence[int]) -> Plan:
    """The shapes to tune; needs neither a GPU nor vLLM.

    Args:
        model: a folder or file with a config.json, or a model's name.
        tp: tensor parallel sizes.
        kernels: which are tuned.
        rows: tokens of decode steps, the smallest first.

    Raises:
        ConfigurationError: the model is not supported, or has nothing to tune.
    """
    name, config = read_model_config(model)
    models = [TunedModel(name, size, layers_as_served(config, size)) for size in tp]
    sizes = [(model_at_size, shapes_of(model_at_size, kernels)) for model_at_size in models]
    labels: dict[Shape, list[str]] = {}
    for model_at_size, its in sizes:
        for shape in its:
            labels.setdefault(shape, []).append(model_at_size.label)
    if not labels:
        raise ConfigurationError(f"there is nothing to tune in {name}: {_NOTHING[kernels]}")
    if not any(tunable_rows(shape, rows) for shape in labels):
        raise ConfigurationError(
            f"there is nothing to tune in {name} for {rows[0]} tokens: vLLM makes larger blocks of them than "
            "Marlin is tuned for; leave --rows out"
        )
    if kernels == "triton":
        _check_triton_takes(name, config)
    return Plan(config, sizes, labels)


def _check_triton_takes(name: str, config: dict[str, Any]) -> None:
    """Refuses layouts of int4 weights that vLLM runs on Marlin only."""
    found = quantization_of(config)
    described = found if isinstance(found, dict) else {}
    if str(described.get("quant_method", "")).lower() == "awq":
        reason = "AWQ's layout of int4 weights"
    elif described.get("desc_act"):
        reason = "GPTQ's int4 weights in act-order (desc_act)"
    else:
        return
    raise ConfigurationError(
        f"vLLM's Triton kernel does not take {reason}, which {name} has; leave --kernels triton out to tune Marlin"
    )


def not_read_by_default(shape: FusedMoeExperts) -> str | None:
    """Why vLLM does not read this table on a GB10 by default; None if it does.

    With `--moe-backend triton` it reads all tables.
    """
    if shape.is_int4:
        return "vLLM runs such experts on Marlin by default"
    if shape.block_shape is not None:
        return "vLLM runs such experts on DeepGEMM by default"
    if shape.dtype is None:
        return "vLLM runs such experts on FlashInfer's CUTLASS kernel by default, if FlashInfer is installed"
    return None


def backend_hints(shapes: Iterable[Shape]) -> list[str]:
    """Hints about tables that vLLM does not read by default."""
    return [
        f"Serve with --moe-backend triton; otherwise the table for {shape.describe()} is not used: {reason}."
        for shape in shapes
        if isinstance(shape, FusedMoeExperts) and (reason := not_read_by_default(shape)) is not None
    ]


def backend(shapes: Iterable[Shape]) -> dict[str, str]:
    """Arguments of an engine that reads the tables of these shapes; a model has one backend for all experts."""
    return {"moe_backend": "triton"} if all(isinstance(shape, FusedMoeExperts) for shape in shapes) else {}


def check_version_takes_int4(shapes: Iterable[Shape]) -> None:
    """Raises ConfigurationError for int4 experts, if the installed vLLM runs them on Marlin only."""
    if any(isinstance(shape, FusedMoeExperts) and shape.is_int4 for shape in shapes) and not triton_runs_int4_experts():
        raise ConfigurationError(
            f"vLLM {installed_vllm()} runs int4 experts on Marlin alone; leave --kernels triton out, or use a later "
            "vLLM"
        )
