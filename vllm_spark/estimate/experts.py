"""How many distinct experts a decode step reads."""

from __future__ import annotations

import math

FURTHER_ROW = 0.58
"""A further row of a sequence in the same step reads as many new experts as this share of another sequence's row.

From the experts that windows of 2, 3, 4 and 5 consecutive tokens read in GLM-5.3-Flash, 288 experts, 8 for a token:
12.6, 17.0, 21.5 and 24.4 (InterfaceX-co-jp/glm53-tensorfold-spark, docs/ROOFLINE.md). `distinct_experts` gives those
for 1.59, 2.16, 2.75 and 3.14 independent rows, which is 0.59, 0.58, 0.58 and 0.53 for each further one.
"""


def independent_rows(sequences: int, rows: int) -> float:
    """Rows with experts of their own that count as much as `rows` consecutive tokens of each of `sequences`."""
    return sequences * (1 + FURTHER_ROW * (rows - 1))


def distinct_experts(experts: int, top_k: int, rows: float) -> float:
    """Expected number of experts that at least one of `rows` goes to, each to `top_k` of `experts` at random.

    Routers prefer some experts, so that a real step reads less: by what is known for sequences of different users,
    hardly less.
    """
    return experts * -math.expm1(rows * math.log1p(-top_k / experts)) if top_k < experts else float(experts)


def busier_half(experts: int, read: float) -> float:
    """Expected number of the `read` experts that the rank with more of them has, if each has half of all experts.

    With expert parallelism the step waits for that rank. Half of the number and its mean deviation, as of a normal
    distribution, for draws without replacement.
    """
    return read / 2 + math.sqrt(read * max(0.0, 1 - read / experts) / (2 * math.pi))
