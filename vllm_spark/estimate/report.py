"""An estimate as a table, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_spark.estimate.pair import Candidate, Estimate
from vllm_spark.estimate.step import COLLECTIVES, ORDER
from vllm_spark.records import indented_json


def as_table(estimate: Estimate) -> Table:
    """Milliseconds of each part of a step, tokens per second, and memory, for each candidate."""
    table = Table(title=f"{estimate.model}: a decode step, milliseconds (predicted)", caption=_caption(estimate))
    table.add_column("")
    for each in estimate.candidates:
        table.add_column(each.name, justify="right")
    for part in ORDER:
        if any(each.step.part_us(part) for each in estimate.candidates):
            table.add_row(part, *(_ms(each.step.part_us(part)) for each in estimate.candidates))
            if part == COLLECTIVES and any(each.step.hidden_us for each in estimate.candidates):
                table.add_row("  (hidden behind kernels)", *(_hidden(each) for each in estimate.candidates))
    table.add_section()
    table.add_row("step", *(_ms(each.step.us) for each in estimate.candidates))
    table.add_row("tokens per second", *(_tokens(each) for each in estimate.candidates))
    table.add_section()
    table.add_row("a machine's weights, GB", *(f"{each.memory.weights / 1e9:.1f}" for each in estimate.candidates))
    table.add_row("its sequences, GB", *(f"{each.memory.sequences / 1e9:.2f}" for each in estimate.candidates))
    table.add_row("room for tokens besides", *(_room(each) for each in estimate.candidates))
    table.add_row("reads in a step, GB", *(f"{each.step.read_bytes / 1e9:.2f}" for each in estimate.candidates))
    return table


def _caption(estimate: Estimate) -> str:
    settings = estimate.settings
    work, gpu = settings.work, settings.gpu
    words = [
        f"batch {work.batch}, context {work.context}, KV cache of {work.kv_bytes:g}-byte numbers",
        f"{gpu.name}: {gpu.gbytes_per_s:g} GB/s, {gpu.four_bit_gbytes_per_s:.3g} with 4-bit weights, "
        f"{gpu.kernel_us:g} us a kernel",
    ]
    if settings.drafted:
        words.append(f"{settings.drafted} drafted, each accepted with probability {settings.acceptance:g}")
    if settings.expert_parallel:
        words.append("with expert parallelism")
    words += [f"link: {each.link.summary}" for each in settings.collectives if each.link is not None]
    words.append(f"vLLM may use {settings.utilization:g} of {gpu.memory_gb:g} GB")
    return "; ".join(words)


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1e3:.2f}" if microseconds else ""


def _hidden(each: Candidate) -> str:
    return f"({each.step.hidden_us / 1e3:.2f})" if each.step.hidden_us else ""


def _tokens(each: Candidate) -> str:
    return f"{each.tokens_per_s:.3g}" if each.memory.fits else "does not fit"


def _room(each: Candidate) -> str:
    if not each.memory.fits:
        return "none"
    return "no limit" if each.memory.more_tokens is None else f"{each.memory.more_tokens:,}"


def as_json(estimates: Sequence[Estimate]) -> str:
    """Everything, with times in microseconds and memory in bytes; one estimate for each batch."""
    content: list[dict[str, Any]] = [
        {
            "model": each.model,
            "batch": each.settings.work.batch,
            "context": each.settings.work.context,
            "kv_bytes": each.settings.work.kv_bytes,
            "drafted": each.settings.drafted,
            "acceptance": each.settings.acceptance,
            "expert_parallel": each.settings.expert_parallel,
            "gpu": asdict(each.settings.gpu),
            "verdict": each.verdict,
            "separately_tokens_per_s": each.separately,
            "candidates": [
                {
                    "name": candidate.name,
                    "tp": candidate.tp,
                    "step_us": candidate.step.us,
                    "hidden_us": candidate.step.hidden_us,
                    "tokens_per_s": candidate.tokens_per_s,
                    "parts": [asdict(part) for part in candidate.step.parts],
                    "memory": {**asdict(candidate.memory), "fits": candidate.memory.fits},
                }
                for candidate in each.candidates
            ],
        }
        for each in estimates
    ]
    return indented_json(content)


def plot(estimates: Sequence[Estimate], path: Path) -> None:
    """Draws tokens per second over batches, a line for each candidate; the suffix chooses the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    batches = [each.settings.work.batch for each in estimates]
    for index, first in enumerate(estimates[0].candidates):
        chosen = [each.candidates[index] for each in estimates]
        speeds = [each.tokens_per_s if each.memory.fits else float("nan") for each in chosen]
        axes.plot(batches, speeds, marker="o", label=first.name)
    separately = [
        each.separately if each.separately is not None and each.candidates[0].memory.fits else float("nan")
        for each in estimates
    ]
    axes.plot(batches, separately, linestyle=":", color="gray", label="two, half of the batch each")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("sequences at once")
    axes.set_ylabel("tokens per second, all sequences (predicted)")
    axes.set_title(f"{estimates[0].model} on {estimates[0].settings.gpu.name}")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path)
