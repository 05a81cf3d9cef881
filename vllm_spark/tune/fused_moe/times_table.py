"""`vllm-spark tune MODEL --from-times FILE`: a table from times that were measured elsewhere."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from vllm_spark.compat.versions import installed_vllm, vllm_source
from vllm_spark.errors import ConfigurationError
from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.fused_moe.published import PublishedRow, PublishedSet, published_table
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts
from vllm_spark.kernels.lookup import user_folder
from vllm_spark.tune.fused_moe.from_times import SizeResult, evaluate, read_times
from vllm_spark.tune.plan import check_folder, make_plan
from vllm_spark.tune.tables import NewFusedMoeTable, store_tables


@dataclass(frozen=True)
class TimesOutcome:
    """What became of the times.

    Attributes:
        table: each size with its fastest row, for people.
        path: of the table that was written; None if no row is faster than vLLM's choice.
        results: for each size.
    """

    table: Table
    path: Path | None
    results: Sequence[SizeResult]


def write_table(
    model: str,
    tp: Sequence[int],
    times: Path,
    source: str,
    device: str | None = None,
    out: Path | None = None,
    on_note: Callable[[str], None] = lambda sentence: None,
) -> TimesOutcome:
    """Writes a table of the rows that are faster than vLLM's choice; needs no GPU.

    Args:
        model: a folder or file with a config.json, or a model's name.
        tp: the tensor parallel size whose experts were measured.
        times: file of them, as for `read_times`.
        source: where they come from.
        device: on which they were measured; None for a GB10.
        out: folder of the table; None for the one that serving reads.
        on_note: called with a sentence about times that are left out, or a table that was backed up.

    Raises:
        ConfigurationError: the model has not exactly one shape of experts for Triton, the times cannot be used, or the
            table cannot be written.
    """
    name = device or GB10.name
    shape, label = _shape(model, tp)
    folder = out or user_folder()
    if folder is None:
        raise ConfigurationError("this user has no home folder for the tables; give a folder with --output")
    check_folder(folder, "--output")
    if installed_vllm() is None:
        raise ConfigurationError("vLLM, whose own choice the other rows of a table have, is not installed; install it")
    measured = read_times(times)
    results = evaluate(measured, shape, name)
    if left_out := sorted(measured.keys() - {each.tokens for each in results}):
        on_note(
            f"Left out, because vLLM's benchmark measures another kernel of int4 there than serves: the times for "
            f"{', '.join(map(str, left_out))} tokens"
        )
    path = None
    if any(each.used for each in results):
        table, provenance = published_table(
            _as_set(shape, label, name, source, times, results), {"vllm": vllm_source()}
        )
        (path,) = store_tables([NewFusedMoeTable(name, shape.table, table, provenance)], folder, on_note)
    return TimesOutcome(_shown(results, shape), path, results)


def _shape(model: str, tp: Sequence[int]) -> tuple[FusedMoeExperts, str]:
    """The only shape of the model's experts for Triton, and its label."""
    if len(tp) != 1:
        raise ConfigurationError(f"--tp {','.join(map(str, tp))} names {len(tp)} sizes, and times are of one; give it")
    plan = make_plan(model, tp, "triton", (1,))
    shapes = [(shape, labels[0]) for shape, labels in plan.labels.items() if isinstance(shape, FusedMoeExperts)]
    if len(shapes) != 1:
        raise ConfigurationError(f"{model} has {len(shapes)} shapes of experts, and the times are of one")
    return shapes[0]


def _as_set(
    shape: FusedMoeExperts, label: str, device: str, source: str, times: Path, results: Sequence[SizeResult]
) -> PublishedSet:
    used = {each.tokens: each for each in results if each.used}
    return PublishedSet(
        source=source,
        page=times.name,
        device=device,
        date=datetime.date.today(),
        measured="medians of the times of each kernel",
        shape=shape,
        models=(label,),
        rows={
            tokens: PublishedRow.model_validate({**each.row, "gain": round(each.gain or 0.0, 4)})
            for tokens, each in used.items()
        },
        vllm=tuple(each.tokens for each in results if not each.used and min(used) < each.tokens < max(used)),
    )


def _shown(results: Sequence[SizeResult], shape: FusedMoeExperts) -> Table:
    table = Table(title=f"{shape.describe()}: microseconds, medians", title_justify="left", box=None)
    for heading in ("tokens", "tile", "warps, stages", "times", "median", "vLLM's choice", "gain", ""):
        table.add_column(heading, justify="left" if heading in ("tile", "") else "right")
    for each in results:
        table.add_row(
            str(each.tokens),
            " x ".join(str(each.row[f"BLOCK_SIZE_{axis}"]) for axis in "MNK"),
            f"{each.row['num_warps']}, {each.row['num_stages']}",
            str(each.repetitions),
            f"{each.microseconds:.1f}",
            "not measured" if each.vllm_us is None else f"{each.vllm_us:.1f}",
            "" if each.gain is None else f"{each.gain:.1%}".replace("%", " %"),
            "used" if each.used else "vLLM's choice stays",
        )
    return table
