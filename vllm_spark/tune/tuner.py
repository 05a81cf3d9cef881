"""The search over all shapes of a model, with the journal of its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_spark.kernels.devices import Device
from vllm_spark.kernels.fused_moe.shapes import FusedMoeParameters
from vllm_spark.kernels.marlin.table import MarlinParameters, MarlinShape
from vllm_spark.tune.fused_moe import search as fused_moe_search
from vllm_spark.tune.fused_moe.trial import Trials
from vllm_spark.tune.journal import Journal
from vllm_spark.tune.marlin import search as marlin_search
from vllm_spark.tune.results import FusedMoeOutcome, Outcome, Shape, is_vllm_default, tunable_rows
from vllm_spark.tune.timing import HangError


def tune(
    shapes: Sequence[Shape],
    rows: Sequence[int],
    device: Device,
    journal: Journal,
    on_outcome: Callable[[Outcome], None],
    on_trial: Callable[[], None] = lambda: None,
    on_note: Callable[[str], None] = lambda sentence: None,
) -> list[Outcome]:
    """Searches every shape and number of rows that is not in the journal yet, and adds each outcome to it.

    Args:
        rows: tokens of decode steps; for each shape, the tunable ones of them (`tunable_rows`).
        on_outcome: called for each outcome, also for those in the journal.
        on_trial: called for every compiled row of a FusedMoE table.
        on_note: called with a sentence about the reliability of results.

    Raises:
        HangError: a kernel hangs. Unless it was called with vLLM's own choice, the parameters are in the journal now,
            and the next search skips them.
        SparkError: the GPU's memory is full, or a kernel failed.
    """
    known, hung = journal.known(), journal.hung()
    outcomes: list[Outcome] = []
    trials = Trials(device)

    def note(outcome: Outcome, *, new: bool) -> None:
        outcomes.append(outcome)
        if new:
            journal.add(outcome)
        on_outcome(outcome)

    for shape in shapes:
        numbers = tunable_rows(shape, rows)
        for number in numbers:
            if (shape, number) in known:
                note(known[shape, number], new=False)
        missing = [number for number in numbers if (shape, number) not in known]
        if not missing:
            continue
        try:
            if isinstance(shape, MarlinShape):
                with marlin_search.weights_of(shape, on_note) as weights:
                    for number in missing:
                        note(marlin_search.search(shape, number, weights, device, hung=hung), new=True)
            else:
                with fused_moe_search.weights_of(shape, on_note) as layers:
                    for number in missing:
                        before = [e for e in outcomes if isinstance(e, FusedMoeOutcome) and e.shape == shape]
                        found = fused_moe_search.search(
                            shape, number, layers, device, trials, before, on_trial=on_trial, hung=hung
                        )
                        note(found, new=True)
        except HangError as error:
            hanging = error.parameters
            if isinstance(hanging, MarlinParameters | FusedMoeParameters) and not is_vllm_default(hanging):
                journal.add_hang(shape, hanging)
            raise
    return outcomes
