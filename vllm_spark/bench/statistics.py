"""Statistics of samples (medians, percentiles, ratios within a round), and a description of the machine."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Sequence

Samples = list[float]


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample below which `share` (0 to 1) of all lie."""
    return sorted(samples)[min(len(samples) - 1, int(share * len(samples)))]


def summary(rounds: Iterable[Sequence[float]]) -> dict[str, float]:
    """Median and 99th percentile over the samples of all rounds."""
    pooled = [sample for samples in rounds for sample in samples]
    return {"median": statistics.median(pooled), "p99": percentile(pooled, 0.99)}


def ratios(ours: Iterable[Sequence[float]], theirs: Iterable[Sequence[float]]) -> list[float]:
    """Ratio of the medians in each round, whose candidates run within minutes, at a similar load of the machine."""
    pairs = zip(ours, theirs, strict=True)
    return [statistics.median(mine) / statistics.median(other) for mine, other in pairs]


def machine(*versions: str) -> str:
    """Processor, cores, `versions` and load, for the title of a table."""
    parts = [platform.machine(), f"{os.cpu_count()} cores", *versions, f"load {os.getloadavg()[0]:.1f}"]
    return ", ".join(parts)
