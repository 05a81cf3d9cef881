"""Results of a search as tables and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from vllm_spark.errors import SparkError
from vllm_spark.kernels.fused_moe.shapes import FusedMoeParameters
from vllm_spark.kernels.marlin.table import MarlinParameters, MarlinShape
from vllm_spark.kernels.marlin.tile_choice import describe
from vllm_spark.tune.decode_comparison import Comparison, is_kept
from vllm_spark.tune.results import Outcome, Shape

_TITLES = {"marlin": "Marlin, experts: one GEMM", "fused_moe": "Triton, experts: both GEMMs and what is between them"}


def outcomes_tables(outcomes: Sequence[Outcome], where: str) -> list[Table]:
    """One for each kernel, a row for each shape and number of tokens; `where` names machine and versions."""
    return [
        _table(title, mine, where)
        for kind, title in _TITLES.items()
        if (mine := [outcome for outcome in outcomes if outcome.kind == kind])
    ]


def _table(title: str, outcomes: Sequence[Outcome], where: str) -> Table:
    table = Table(title=f"{title}: microseconds, medians", caption=where)
    for heading in ("shape", "rows", "default", "tuned", "ratio", "parameters"):
        table.add_column(heading, justify="left" if heading in ("shape", "parameters") else "right")
    for shape, of_shape in _by_shape(outcomes).items():
        first = in_words(shape)
        for outcome in sorted(of_shape, key=lambda each: each.rows):
            table.add_row(
                first,
                str(outcome.rows),
                f"{outcome.default_us:.2f}",
                f"{outcome.tuned_us:.2f}",
                f"{outcome.ratio:.3f}",
                _format(outcome.parameters),
            )
            first = ""
        table.add_section()
    return table


def comparison_table(label: str, comparisons: Sequence[Comparison], where: str) -> Table:
    """Decode steps of one rank of the model `label`, with and without its tables."""
    table = Table(title=f"A decode step of one rank of {label}, milliseconds, medians of the rounds", caption=where)
    for heading in ("batch", "vLLM's defaults", "tuned", "ratio", ""):
        table.add_column(heading, justify="right")
    for each in comparisons:
        verdict = "kept" if is_kept(each.ratio) else "not kept"
        times = (" ".join(f"{time:.3f}" for time in side) for side in (each.untuned, each.tuned))
        table.add_row(str(each.batch), *times, f"{each.ratio:.3f}", verdict)
    return table


def plot(outcomes: Sequence[Outcome], where: str, path: Path) -> None:
    """Draws times with and without tuned parameters over the rows into `path`; the suffix chooses the format.

    A dot for each candidate shows how much the choice of parameters matters.

    Raises:
        SparkError: `path` cannot be written.
    """
    from matplotlib.figure import Figure

    shapes = _by_shape(outcomes)
    figure = Figure(figsize=(5 * len(shapes), 4.5), layout="constrained")
    for axes, (shape, of_shape) in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes.items(), strict=True):
        of_shape = sorted(of_shape, key=lambda each: each.rows)
        rows = [outcome.rows for outcome in of_shape]
        tried = [(each.rows, ratio * each.default_us) for each in of_shape for _, ratio in each.tried]
        if tried:
            axes.scatter(*zip(*tried, strict=True), s=8, color="lightgray", label="tried")
        axes.plot(rows, [outcome.default_us for outcome in of_shape], marker="o", label="vLLM's default")
        axes.plot(rows, [outcome.tuned_us for outcome in of_shape], marker="o", label="tuned")
        axes.set_ylim(0, 2 * max(outcome.default_us for outcome in of_shape))
        axes.set_xlabel("tokens in the step")
        axes.set_ylabel("microseconds, median")
        kernel = "Marlin" if isinstance(shape, MarlinShape) else "Triton"
        axes.set_title(f"{kernel}: {in_words(shape)}", fontsize="small")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.suptitle(where, fontsize="small")
    try:
        figure.savefig(path)
    except OSError as error:
        raise SparkError(
            f"the plot {path} cannot be written ({error.strerror}); make room there, or give another file with --plot"
        ) from None


def in_words(shape: Shape) -> str:
    """A shape as text, for tables and messages."""
    return describe(shape) if isinstance(shape, MarlinShape) else shape.describe()


def _by_shape(outcomes: Sequence[Outcome]) -> dict[Shape, list[Outcome]]:
    shapes: dict[Shape, list[Outcome]] = {}
    for outcome in outcomes:
        shapes.setdefault(outcome.shape, []).append(outcome)
    return shapes


def _format(parameters: MarlinParameters | FusedMoeParameters | None) -> str:
    if isinstance(parameters, FusedMoeParameters):
        tile = " x ".join(map(str, (parameters.BLOCK_SIZE_M, parameters.BLOCK_SIZE_N, parameters.BLOCK_SIZE_K)))
        return f"{tile}, {parameters.num_warps} warps, {parameters.num_stages} stages"
    if parameters is None or parameters.uses_default_tile:
        return "default"
    return f"{parameters.thread_k} x {parameters.thread_n}, {parameters.blocks_per_sm} blocks/SM"
