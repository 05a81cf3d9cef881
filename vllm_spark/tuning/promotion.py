"""What of a search is kept: rows whose decode step became faster as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm_spark.tuning.outcome import Outcome


def promoted(outcomes: Iterable[Outcome], ratios: Mapping[int, float]) -> list[Outcome]:
    """The outcomes, with the default back in rows whose decode step did not become faster.

    Args:
        outcomes: of the search.
        ratios: of a decode step's time, tuned over untuned, by batch; a row is judged by the batch nearest to it.
    """
    kept: list[Outcome] = []
    for outcome in outcomes:
        batch = min(ratios, key=lambda known: abs(known - outcome.rows))
        kept.append(outcome.with_default() if ratios[batch] >= 1.0 else outcome)
    return kept
