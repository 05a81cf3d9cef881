"""Options of a tuning run, and the checks that need neither a GPU nor vLLM and so come before anything slow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_spark.errors import ConfigurationError
from vllm_spark.files import check_writable
from vllm_spark.kernels.lookup import user_folder
from vllm_spark.models.regroup import with_groups_that_fit
from vllm_spark.models.shard import shard_as_model
from vllm_spark.tune.plan import Plan, make_plan
from vllm_spark.tune.tuned_model import Kernels

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


def prepare(options: TuningOptions) -> tuple[Plan, Path]:
    """The plan and the folder of the tables; creates no file and no folder.

    Raises:
        ConfigurationError: the model is not known or has nothing to tune, a file or folder cannot be written, or no
            shard of the model can be made for the comparison of decode steps.
    """
    plan = make_plan(options.model, options.tp, options.kernels, options.rows)
    folder = options.out or user_folder()
    if folder is None:
        raise ConfigurationError("this user has no home folder for the tables; give a folder with --out")
    _check_folder(folder, "--out")
    if options.plot is not None:
        from vllm_spark.bench.collective_report import check_plot

        check_plot(options.plot)
        check_writable(options.plot)
    if options.decode:
        if options.keep_logs is not None:
            _check_folder(options.keep_logs, "--keep-logs")
        for model, _ in plan.sizes:  # found out now, not after the search
            shard_as_model(with_groups_that_fit(plan.config, model.tp), model.tp)
    return plan, folder


def _check_folder(folder: Path, option: str) -> None:
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
