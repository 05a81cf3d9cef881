"""How many distinct experts a decode step reads."""

from __future__ import annotations

import functools
import math

SKEW = 0.68
"""Exponent of the experts' popularity: the expert of rank i is chosen in proportion to i ** -SKEW. 0: all alike."""

FURTHER_ROW = 0.62
"""A further row of a sequence in the same step reads as many new experts as this share of another sequence's row.

Both are from the numbers of distinct experts that steps of GLM-5.3-Flash read on GB10, 288 experts, 8 for a token, text
of users (InterfaceX-co-jp/glm53-tensorfold-spark, docs/ROOFLINE.md): of one sequence 12.6, 17.0, 21.5, 24.4 and some
34.5 for 2, 3, 4, 5 and 8 rows; 40.5, 54.0 and 64.8 for 4 rows of 2, 3 and 4 sequences, 48.2 for 5 of 2. Smallest
squares of relative errors; the largest is 6 %. Other models and texts differ: see docs/estimate.md. Models with random
weights have a skew of 0.
"""


def independent_rows(sequences: int, rows: int) -> float:
    """Rows with experts of their own that count as much as `rows` consecutive tokens of each of `sequences`."""
    return sequences * (1 + FURTHER_ROW * (rows - 1))


def distinct_experts(experts: int, top_k: int, rows: float, skew: float = SKEW) -> float:
    """Expected number of experts that at least one of `rows` goes to, each to `top_k` of `experts`."""
    return sum(
        -math.expm1(rows * math.log1p(-chosen)) if chosen < 1 else 1.0 for chosen in _chosen(experts, top_k, skew)
    )


@functools.cache
def _chosen(experts: int, top_k: int, skew: float) -> tuple[float, ...]:
    """Probabilities that a row goes to each expert, the most popular first; their sum is `top_k`."""
    weights = [rank**-skew for rank in range(1, experts + 1)]
    certain, rest = 0, sum(weights)
    while certain < top_k and weights[certain] * (top_k - certain) >= rest:
        rest -= weights[certain]
        certain += 1
    share = (top_k - certain) / rest if certain < top_k else 0.0
    return (1.0,) * certain + tuple(min(weight * share, 1.0) for weight in weights[certain:])


def busier_half(experts: int, read: float) -> float:
    """Expected number of the `read` experts that the rank with more of them has, if each has half of all experts.

    With expert parallelism the step waits for that rank. Half of the number and its mean deviation, as of a normal
    distribution, for draws without replacement.
    """
    return read / 2 + math.sqrt(read * max(0.0, 1 - read / experts) / (2 * math.pi))
