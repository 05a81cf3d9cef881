"""What of a search is kept: rows whose decode step became faster as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm_spark.tuning.outcome import Outcome

FASTER = 0.995
"""Of an untuned step's time: less is more than two equal engines differ by, in the median of some rounds."""


def is_kept(ratio: float) -> bool:
    """Whether a decode step is so much faster that its rows are kept.

    Args:
        ratio: of its time, tuned over untuned.
    """
    return ratio < FASTER


def promoted(outcomes: Iterable[Outcome], ratios: Mapping[int, float]) -> list[Outcome]:
    """The outcomes, with the default back in rows whose decode step did not become faster.

    Args:
        outcomes: of the search.
        ratios: of a decode step's time, tuned over untuned, by batch; a row is judged by the batch nearest to it.
    """
    kept: list[Outcome] = []
    for outcome in outcomes:
        batch = min(ratios, key=lambda known: abs(known - outcome.rows))
        kept.append(outcome if is_kept(ratios[batch]) else outcome.with_default())
    return kept
