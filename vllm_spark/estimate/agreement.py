"""The estimate beside measured speeds: errors, means and explanations (`vllm-spark estimate --published`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich import box
from rich.table import Table

from vllm_spark.estimate.collectives import NCCL_EAGER
from vllm_spark.estimate.model import read_model, stored_as
from vllm_spark.estimate.pair import speed
from vllm_spark.estimate.published import (
    BY_OTHERS,
    EAGLE3_ACCEPTANCE,
    EAGLE3_HEAD,
    OWN,
    SEVERAL_SEQUENCES,
    STEP_OF_8_47_MS,
    Published,
)
from vllm_spark.estimate.speculation import Speculation, eagle_head
from vllm_spark.estimate.step import Step, Workload
from vllm_spark.models.config import read_model_config
from vllm_spark.models.shard import shard_as_model

LARGE = 0.12
"""Relative error from which on an explanation is due."""


@dataclass(frozen=True)
class Compared:
    """Figures of one set-up, measured and predicted, by batches."""

    case: Published
    predicted: tuple[float, ...]

    @property
    def measured(self) -> tuple[float, ...]:
        """The middles of the published ranges."""
        return tuple((least + most) / 2 for least, most in self.case.values)

    @property
    def errors(self) -> tuple[float, ...]:
        """Relative: 0.1 is 10 % more than was measured."""
        return tuple(here / there - 1 for here, there in zip(self.predicted, self.measured, strict=True))


def compare(case: Published) -> Compared:
    """A prediction for each figure of a set-up."""
    predicted = []
    for batch in case.batches:
        step, tokens_per_s = predict(case, batch)
        predicted.append(tokens_per_s if case.measure == "tokens/s" else step.us / 1e3)
    return Compared(case, tuple(predicted))


def predict(case: Published, batch: int) -> tuple[Step, float]:
    """The step of a set-up, and its tokens per second."""
    config = read_model_config(case.model)[1] if isinstance(case.model, str) else case.model
    if case.quantization is not None:
        config = {**config, "quantization_config": case.quantization or None}
    if case.shard:
        config = shard_as_model(config, 2)
    model = read_model(config, case.tp, case.expert_parallel)
    if case.stored is not None:
        model = stored_as(model, case.stored)
    head = eagle_head(EAGLE3_HEAD, case.tp) if case.drafted else None
    speculation = Speculation(case.drafted, EAGLE3_ACCEPTANCE if case.drafted else 0.0, head)
    work = Workload(batch, case.context, kv_bytes=case.kv_bytes, compiled=case.compiled, skew=case.skew)
    return speed(model, work, case.gpu, case.collectives, speculation)


def mean_error(compared: Iterable[Compared]) -> float:
    """Mean of the absolute relative errors, without set-ups that were bad."""
    errors = [abs(error) for each in compared if not each.case.bad_setup for error in each.errors]
    return sum(errors) / len(errors)


def by_others() -> list[Compared]:
    """All figures of others."""
    return [compare(case) for case in BY_OTHERS]


def several_sequences() -> list[Compared]:
    """Figures of others with several sequences at once."""
    return [compare(case) for case in SEVERAL_SEQUENCES]


def own() -> list[Compared]:
    """All figures of this project."""
    return [compare(case) for case in OWN]


def speeds_table(compared: Iterable[Compared], title: str) -> Table:
    """Measured and predicted figures, with errors."""
    table = Table(title=title, box=box.MARKDOWN, title_justify="left")
    for heading in ("set-up", "batch", "unit", "measured", "predicted", "error"):
        table.add_column(heading, justify="left" if heading in ("set-up", "unit") else "right", overflow="fold")
    for each in compared:
        table.add_row(
            each.case.what + (" (bad set-up)" if each.case.bad_setup else ""),
            ", ".join(map(str, each.case.batches)),
            each.case.measure,
            ", ".join(_range(*value) for value in each.case.values),
            ", ".join(_figure(value) for value in each.predicted),
            ", ".join(_percent(error) for error in each.errors),
        )
    return table


def parts_table() -> Table:
    """The published parts of 8.47 ms beside those of the estimate, both for one token."""
    case = next(each for each in BY_OTHERS if each.collectives is NCCL_EAGER)
    step, _ = predict(case, 1)
    tokens = 1 + EAGLE3_ACCEPTANCE
    table = Table(title="The token of 8.47 ms, milliseconds", box=box.MARKDOWN, title_justify="left")
    for heading in ("part", "published", "predicted", "error"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    rows = [(name, there, sum(map(step.part_us, names)) / 1e3 / tokens) for name, there, names in STEP_OF_8_47_MS]
    rows.append(("all", sum(row[1] for row in rows), step.us / 1e3 / tokens))
    for name, there, here in rows:
        table.add_row(name, f"{there:.2f}", f"{here:.2f}", _percent(here / there - 1))
    return table


def explanations(compared: Iterable[Compared]) -> list[str]:
    """A sentence or more for each set-up with a large error."""
    return [f"{each.case.what}: {each.case.why}" for each in compared if max(map(abs, each.errors)) > LARGE]


def sources(compared: Iterable[Compared]) -> str:
    """Where the figures were published, each once."""
    return "; ".join(dict.fromkeys(each.case.source for each in compared))


def _range(least: float, most: float) -> str:
    return _figure(least) if least == most else f"{_figure(least)} to {_figure(most)}"


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _percent(error: float) -> str:
    return f"{error:+.0%}".replace("%", " %")
