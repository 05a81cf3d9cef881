"""The report of `vllm-spark bench decode` as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from itertools import takewhile
from typing import Any

import msgspec
from rich.table import Table

from vllm_spark.bench.decode import Report, Row, candidates_for


def as_table(report: Report, machine: str) -> Table:
    """Milliseconds and tokens per second for each candidate and batch, with ratios to one rank and to vLLM's pair."""
    settings = report.settings
    peers = [name for name in ("tp1", list(candidates_for(settings.device))[-1]) if name in settings.candidates]
    how = "torch.compile" if settings.compile else "no torch.compile"
    caption = [f"{machine}. {settings.steps} steps, {settings.rounds} rounds. Ratios: tokens per second."]
    if "spark-wire" in settings.candidates:
        caption.append(f"The modelled wire: {settings.latency_us:g} us, {settings.gbytes_per_s:g} GB/s.")
    if "tp1" in settings.candidates and len(settings.candidates) > 1:
        caption.append("Random weights of one rank are others than those of two.")
    if settings.one_gpu:
        caption.append("BOTH RANKS SHARE ONE GPU: this shows that it works, not how fast it is.")
    for name, count in report.fallbacks.items():
        if count:
            caption.append(f"{name}: {count} collectives went vLLM's own way.")
    table = Table(title=f"decode step of {settings.model}, {how}", caption=" ".join(caption))
    first_pair, *other_pairs = [name for name in settings.candidates if name != "tp1"] or [""]
    token_column = [f"tokens of {first_pair}"] if other_pairs else []
    ratio_columns = [f"/ {peer}" for peer in peers]
    for name in ("batch", "candidate", "median ms", "p99 ms", "tokens/s", *ratio_columns, *token_column):
        table.add_column(name, justify="left" if name == "candidate" else "right")
    for batch in settings.batches:
        reference = report.row(first_pair, batch)
        for row in report.rows:
            if row.batch != batch:
                continue
            ratios = [report.speedup(row.candidate, batch, peer) for peer in peers]
            same = agreement(row, reference) if reference and row.candidate in other_pairs else ""
            table.add_row(
                str(batch),
                row.candidate,
                f"{row.median:.3f}",
                f"{row.p99:.3f}",
                f"{row.tokens_per_s:.0f}",
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                *([same] if token_column else []),
            )
        table.add_section()
    return table


def agreement(mine: Row, theirs: Row) -> str:
    """How many tokens of every sequence agree from its start on, or `all`, and how far their log-probabilities differ.

    These are compared as far as tokens agree, and at the first that do not: near ties differ by little.
    """
    starts = list(map(_common_start, mine.tokens, theirs.tokens))
    tokens = "all" if mine.tokens == theirs.tokens else f"first {min(starts)}"
    distance = max(
        (
            abs(own - other)
            for sequence, start in enumerate(starts)
            for own, other in zip(
                mine.logprobs[sequence][: start + 1], theirs.logprobs[sequence][: start + 1], strict=True
            )
        ),
        default=0.0,
    )
    return tokens if distance == 0 else f"{tokens}, logprobs ± {distance:.1g}"


def _common_start(mine: list[int], theirs: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=False)))


def as_json(report: Report, machine: str) -> str:
    """Everything, with times in milliseconds."""
    content: dict[str, Any] = {
        "machine": machine,
        "settings": asdict(report.settings),
        "fallbacks": report.fallbacks,
        "rows": [{**msgspec.to_builtins(row), "tokens_per_s": row.tokens_per_s} for row in report.rows],
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=1).decode()
