"""The report of `vllm-spark bench decode` as a table and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import takewhile
from typing import Any

from rich.table import Table

from vllm_spark.bench.decode.engine import TokenLogprob
from vllm_spark.bench.decode.measurement import Report, Row, candidates_for
from vllm_spark.records import indented_json

_KERNELS_SHOWN = 16


def as_table(report: Report, machine: str) -> Table:
    """Milliseconds and tokens per second for each candidate and batch, with ratios to one rank and to vLLM's pair."""
    settings = report.settings
    peers = [name for name in ("tp1", list(candidates_for(settings.device))[-1]) if name in settings.candidates]
    how = "torch.compile" if settings.compile else "no torch.compile"
    caption = [f"{machine}. {settings.steps} steps, {settings.rounds} rounds. Ratios: tokens per second."]
    if "spark-wire" in settings.candidates:
        caption.append(f"The modelled link: {settings.wire.summary}.")
    if "tp1" in settings.candidates and len(settings.candidates) > 1:
        caption.append("The random weights of one rank differ from those of two.")
    if settings.one_gpu:
        caption.append("BOTH RANKS SHARE ONE GPU: a test of function, not of speed.")
    if settings.profile and (without := sorted(report.rounds.keys() - report.profiles.keys() - set(report.missing))):
        caption.append(
            f"No kernels of {', '.join(without)}: prefilling takes too many steps (fewer --prompt-tokens), or the "
            "profiler recorded none (another profiler may be attached)."
        )
    if report.missing:
        caption.append(f"NOT COMPLETE: {', '.join(report.missing)} did not run in every round.")
    for failed_end in report.failed_ends.values():
        caption.append(f"{failed_end}, after its measurements were complete; --keep-logs keeps its output.")
    for name, count in report.fallbacks.items():
        if count:
            caption.append(f"{name}: {count} collectives used vLLM's own path.")
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


def profile_tables(report: Report) -> list[Table]:
    """For each profiled candidate, the kernels that take most of a step's time."""
    tables = []
    batch = report.settings.batches[0]
    for name, profile in report.profiles.items():
        row = report.row(name, batch)
        step = "" if row is None else f" of a step of {row.median * 1e3:.0f}"
        table = Table(title=f"{name}, batch {batch}: kernels of rank 0's GPU, {profile.busy:.0f} us{step}")
        for heading in ("kernel", "calls", "us", "us each"):
            table.add_column(heading, justify="left" if heading == "kernel" else "right", overflow="fold")
        shown, others = profile.kernels[:_KERNELS_SHOWN], profile.kernels[_KERNELS_SHOWN:]
        for kernel in shown:
            each = kernel.microseconds / kernel.calls
            table.add_row(kernel.name, f"{kernel.calls:.0f}", f"{kernel.microseconds:.0f}", f"{each:.1f}")
        if others:
            calls, time = (sum(figures) for figures in zip(*((k.calls, k.microseconds) for k in others), strict=True))
            table.add_row(f"{len(others)} others", f"{calls:.0f}", f"{time:.0f}", "")
        tables.append(table)
    return tables


def agreement(mine: Row, theirs: Row) -> str:
    """The number of leading tokens that agree in every sequence, or `all`, and the largest log-probability difference.

    Log-probabilities are compared up to and including the first token that differs: near ties differ by little.
    """
    starts = map(_common_start, mine.tokens, theirs.tokens)
    tokens = "all" if mine.tokens == theirs.tokens else f"first {min(starts)}"
    distance = max(map(_distance, mine.logprobs, theirs.logprobs), default=0.0)
    return tokens if distance == 0 else f"{tokens}, logprobs ± {distance:.1g}"


def _distance(mine: list[TokenLogprob], theirs: list[TokenLogprob]) -> float:
    """The largest difference in one sequence."""
    distance = 0.0
    for (token, own), (their_token, other) in zip(mine, theirs, strict=False):
        if own != other:
            distance = max(distance, math.inf if own is None or other is None else abs(own - other))
        if token != their_token:
            break  # later tokens have different contexts
    return distance


def _common_start(mine: list[int], theirs: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=False)))


def as_json(report: Report, machine: str) -> str:
    """Everything, with times in milliseconds."""
    content: dict[str, Any] = {
        "machine": machine,
        "settings": {**asdict(report.settings), "wire": report.settings.wire.model_dump(mode="json")},
        "missing": report.missing,
        "failed_ends": report.failed_ends,
        "fallbacks": report.fallbacks,
        "profiles": report.profiles,
        "rows": [{**asdict(row), "tokens_per_s": row.tokens_per_s} for row in report.rows],
    }
    return indented_json(content)
