"""Which rows of a search go into a table: those whose whole decode step became faster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm_spark.tune.results import Outcome

MAX_KEPT_RATIO = 0.995
"""Largest ratio of a decode step's time, tuned over untuned, at which its rows are kept.

The medians of two identical engines differ by less than this over several rounds.
"""


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
