"""Comparison of whole decode steps with and without tuned tables, in real engines that take turns.

It decides which rows of a search go into a table.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_spark.bench.decode import measurement as decode
from vllm_spark.errors import ConfigurationError
from vllm_spark.files import atomic_write_text
from vllm_spark.models.regroup import regrouped_config
from vllm_spark.models.shard import shard_as_model
from vllm_spark.processes.group import ProcessGroup
from vllm_spark.tune.results import Outcome

MAX_KEPT_RATIO = 0.995
"""Largest ratio of a decode step's time, tuned over untuned, at which its rows are kept.

The medians of two identical engines differ by less than this over several rounds.
"""


@dataclass(frozen=True)
class Comparison:
    """One batch: milliseconds of a step, medians of each round."""

    batch: int
    untuned: list[float]
    tuned: list[float]

    @property
    def ratio(self) -> float:
        """Tuned over untuned: the median of the rounds' ratios."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.tuned, self.untuned, strict=True))


@dataclass(frozen=True)
class Settings:
    """Settings of a comparison.

    Attributes:
        config: of the model; one rank's shard of it is run, without collectives.
        tp: ranks that share the model.
        tables: a folder as `lookup.user_folder` is.
        batches: sequences decoded together.
        rounds: engines started for each side.
        steps: timed for each batch in a round.
        compile: with torch.compile, which is vLLM's default.
        engine: more arguments of `vllm.LLM`.
        timeout: seconds for one engine.
    """

    config: Mapping[str, Any]
    tp: int
    tables: Path
    batches: Sequence[int] = (1, 4, 8)
    rounds: int = 4
    steps: int = 300
    compile: bool = True
    engine: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 900.0


def compare(
    settings: Settings,
    programs: ProcessGroup,
    on_engine: Callable[[str, int], None],
    on_note: Callable[[str], None],
) -> list[Comparison]:
    """Runs both sides in every round.

    Args:
        on_engine: called with the side and the round (from 0) before each engine starts.
        on_note: called with a sentence for each engine that failed after its measurements were complete.

    Raises:
        SparkError: an engine failed; its logs are in `programs.logs`.
    """
    if settings.tables.name != "tuned" or settings.tables.parent.name != "vllm-spark":
        raise ConfigurationError(
            f"{settings.tables} is not a folder of user tables: its path must end in vllm-spark/tuned"
        )
    model = programs.folder / "shard"
    shard = shard_as_model(regrouped_config(settings.config, settings.tp), settings.tp)
    atomic_write_text(model / "config.json", json.dumps(shard), "configuration")
    # The folder has no preprocessor files, which vLLM needs for images.
    engine = {"language_model_only": True} if isinstance(shard.get("text_config"), dict) else {}
    report = decode.measure(
        decode.Settings(
            device="cuda",
            model=str(model),
            candidates=decode.TUNING,
            batches=tuple(settings.batches),
            steps=settings.steps,
            rounds=settings.rounds,
            compile=settings.compile,
            engine=engine | dict(settings.engine),
            timeout=settings.timeout,
            environment={"XDG_CONFIG_HOME": str(settings.tables.parent.parent)},
        ),
        programs,
        on_engine,
    )
    for failed_end in report.failed_ends.values():
        on_note(f"{failed_end}, after its measurements were complete; --keep-logs keeps its output")
    rows = {(row.candidate, row.batch): row.medians for row in report.rows}
    return [Comparison(batch, rows["untuned", batch], rows["tuned", batch]) for batch in settings.batches]


def is_kept(ratio: float) -> bool:
    """Whether the rows of a decode step are kept.

    Args:
        ratio: of the step's time, tuned over untuned.
    """
    return ratio < MAX_KEPT_RATIO


def promoted(outcomes: Iterable[Outcome], ratios: Mapping[int, float]) -> list[Outcome]:
    """The outcomes, with vLLM's default in rows whose decode step did not become faster.

    Args:
        outcomes: of the search.
        ratios: of a decode step's time, tuned over untuned, by batch; a row is decided by the batch nearest to it.
    """
    kept: list[Outcome] = []
    for outcome in outcomes:
        batch = min(ratios, key=lambda known: abs(known - outcome.rows))
        kept.append(outcome if is_kept(ratios[batch]) else outcome.with_default())
    return kept
