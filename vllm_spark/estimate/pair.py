"""A model on one machine and on two: steps, tokens per second, memory, and whether the second machine pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_spark.estimate.collectives import Collectives
from vllm_spark.estimate.gpu import Gpu
from vllm_spark.estimate.memory import Memory, memory_of
from vllm_spark.estimate.model import Model, read_model
from vllm_spark.estimate.speculation import Speculation
from vllm_spark.estimate.step import COLLECTIVES, Step, Workload, decode_step, joined

PAYS = 1.1
"""Two machines pay from this multiple of one machine's tokens on; the model is not more exact than that."""

_TWO = "two, "
"""What names of candidates of two machines begin with."""

DraftOf = Callable[[int], Model | None]
"""The part of the draft of one of this many ranks; None: a draft that costs nothing."""


@dataclass(frozen=True)
class Settings:
    """What is estimated.

    Attributes:
        gpu: of each machine.
        work: batch, context and the KV cache's type; its rows are set by `drafted`.
        collectives: of two machines, a candidate each.
        drafted: tokens that are drafted in a step for each sequence; 0: no speculation.
        acceptance: probability that a drafted token is accepted if all before it were.
        expert_parallel: whether each of two machines has half of the experts whole.
        utilization: share of the memory that vLLM may use.
    """

    gpu: Gpu
    work: Workload
    collectives: tuple[Collectives, ...]
    drafted: int = 0
    acceptance: float = 0.0
    expert_parallel: bool = False
    utilization: float = 0.8


@dataclass(frozen=True)
class Candidate:
    """A way to run the model.

    Attributes:
        name: for people.
        tp: machines.
        step: a decode step.
        tokens_per_s: of all sequences together.
        memory: of one machine.
    """

    name: str
    tp: int
    step: Step
    tokens_per_s: float
    memory: Memory


@dataclass(frozen=True)
class Estimate:
    """All candidates: one machine, then two with each implementation of collectives.

    Attributes:
        model: its name.
        settings: what was asked.
        candidates: the first one is one machine.
        separately: tokens per second of two machines that serve half of the batch each, without each other; None: the
            batch is 1.
    """

    model: str
    settings: Settings
    candidates: tuple[Candidate, ...]
    separately: float | None

    @property
    def verdict(self) -> str:
        """Whether TP=2 pays with the first implementation of collectives, in one sentence."""
        one, two = self.candidates[0], self.candidates[1]
        if not two.memory.fits:
            return (
                f"It fits on neither one nor two machines: half of it takes {_gb(two.memory)} GB, and vLLM may use "
                f"{two.memory.usable / 1e9:.0f} GB of each."
            )
        if not one.memory.fits:
            return (
                f"TP=2 is needed: one machine would need {_gb(one.memory)} GB, and vLLM may use "
                f"{one.memory.usable / 1e9:.0f} GB of it; two make {two.tokens_per_s:.3g} tokens per second."
            )
        ratio = two.tokens_per_s / one.tokens_per_s
        pays = "pays" if ratio >= PAYS else "hardly pays" if ratio >= 1 else "does not pay"
        waits = two.step.part_us(COLLECTIVES) / two.step.us
        sentence = (
            f"TP=2 {pays}: two machines make {ratio:.2f} times the tokens of one at batch {self.settings.work.batch} "
            f"({two.tokens_per_s:.3g} and {one.tokens_per_s:.3g} per second), and collectives "
            f"({two.name.removeprefix(_TWO)}) take {waits:.0%} of their step"
        )
        if self.separately is not None:
            sentence += f"; two machines that serve half of the batch each make {self.separately:.3g}"
        return f"{sentence}."


def estimate(name: str, config: Mapping[str, Any], settings: Settings, draft_of: DraftOf) -> Estimate:
    """The candidates of a model.

    Args:
        name: of the model, for people.
        config: its config.json.
        settings: what is estimated.
        draft_of: the draft; it is not called without speculation.

    Raises:
        ConfigurationError: the model is not supported, or two machines cannot divide it.
    """
    candidates = [candidate(config, settings, draft_of, 1, None)]
    candidates += [candidate(config, settings, draft_of, 2, each) for each in settings.collectives]
    separately = None
    if settings.work.batch > 1:
        half = replace(settings, work=replace(settings.work, batch=-(-settings.work.batch // 2)))
        alone = candidate(config, half, draft_of, 1, None)
        separately = alone.tokens_per_s * settings.work.batch / half.work.batch
    return Estimate(name, settings, tuple(candidates), separately)


def candidate(
    config: Mapping[str, Any], settings: Settings, draft_of: DraftOf, tp: int, collectives: Collectives | None
) -> Candidate:
    """One way to run a model; arguments as for `estimate`."""
    model = read_model(config, tp, settings.expert_parallel)
    draft = draft_of(tp) if settings.drafted else None
    speculation = Speculation(settings.drafted, settings.acceptance, draft)
    step, tokens_per_s = speed(model, settings.work, settings.gpu, collectives, speculation)
    memory = memory_of(
        [model, *([] if draft is None else [draft])],
        replace(settings.work, rows=1 + settings.drafted),
        settings.gpu.memory_gb * 1e9 * settings.utilization,
        collectives.rank_bytes if collectives is not None else 0.0,
    )
    name = "one machine" if collectives is None else f"{_TWO}{collectives.name}"
    return Candidate(name, tp, step, tokens_per_s, memory)


def speed(
    model: Model, work: Workload, gpu: Gpu, collectives: Collectives | None, speculation: Speculation
) -> tuple[Step, float]:
    """A step with its draft, and tokens per second of all sequences."""
    verified = replace(work, rows=1 + speculation.drafted)
    step = decode_step(model, verified, gpu, collectives)
    step = replace(step, parts=joined([*step.parts, *speculation.cost(verified, gpu, collectives)]))
    return step, work.batch * speculation.tokens / step.us * 1e6


def over_batches(
    name: str, config: Mapping[str, Any], settings: Settings, draft_of: DraftOf, batches: Sequence[int]
) -> list[Estimate]:
    """The same for several batches."""
    return [
        estimate(name, config, replace(settings, work=replace(settings.work, batch=batch)), draft_of)
        for batch in batches
    ]


def _gb(memory: Memory) -> str:
    return f"{(memory.weights + memory.sequences + memory.communicators) / 1e9:.0f}"
