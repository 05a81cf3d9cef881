"""The steps of healing: each rail fails under traffic and must come back, by the runtime or by the user's hand."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_spark.collective import CollectiveError, Runtime
from vllm_spark.first_run.context import Context
from vllm_spark.first_run.result import Advice, Outcome, StepFailedError

if TYPE_CHECKING:
    from vllm_spark.first_run.checked import CheckedCollectives

HEAL_SECONDS = 60.0
"""Limit for a rail to come back: its hold-down, which begins with seconds, is part of that."""

PULL_SECONDS = 120.0
"""Limit for the user to pull a cable, or to put it back."""

_BATCH = 20
_START = "not all rails were open at the start"
_HEAL = Advice(
    "a rail that fails while a model is served would stay out",
    "see the log and the kernel's messages of both machines, and send the report files to the maintainers",
)
_PULL = Advice(
    "either no cable was pulled or put back in time, or its port did not notice",
    "run it again, or without --pull; if the cable was pulled, send the report files to the maintainers",
)
_BROKEN = Advice(
    "collectives must go on over the other rail, or wait until one is back",
    "see that the other cables are in, and send the report files of both machines to the maintainers",
)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What a machine has seen of its rails: both stop after the same collective."""

    enough: bool


def run_healing(context: Context) -> Outcome:
    """Breaks each rail in turn, on the listening machine, while collectives run."""
    figures: dict[str, float] = {}
    with _traffic(context) as (runtime, checked):
        _until(context, checked, lambda: _all_open(runtime), HEAL_SECONDS, _START, _HEAL)
        for rail in range(len(context.rails)):
            name = context.rail_name(rail)
            context.note(f"breaking {name} while collectives run")
            before = runtime.counters()
            context.meet()  # both have counted before one breaks it
            started = time.monotonic()
            if context.rank == 0:
                runtime.break_rail(rail)

            def back(before: int = before.rail_recoveries) -> bool:
                return runtime.counters().rail_recoveries > before and _all_open(runtime)

            _until(context, checked, back, HEAL_SECONDS, f"{name} did not come back", _HEAL)
            figures[f"rail_{rail}_seconds"] = round(time.monotonic() - started, 3)
        counters = dataclasses.asdict(runtime.counters())
    times = ", ".join(f"{seconds:.1f}" for seconds in figures.values())
    return Outcome(f"back after {times} s, {checked.done} collectives right", {**figures, "counters": counters})


def run_pulling(context: Context) -> Outcome:
    """Asks the user to pull each cable and to put it back, while collectives run."""
    if not context.plan.pull:
        return Outcome("without --pull no cable is pulled", skipped=True)
    with _traffic(context) as (runtime, checked):
        _until(context, checked, lambda: _all_open(runtime), HEAL_SECONDS, _START, _HEAL)
        context.note(f"PULL a cable between the machines now (within {PULL_SECONDS:g} s)")
        started = time.monotonic()
        # All functions of a cable go out with it: one rail, or both.
        _until(context, checked, lambda: not _all_open(runtime), PULL_SECONDS, "no rail went out", _PULL)
        out = time.monotonic() - started
        context.note(f"a rail is out after {out:.0f} s; PUT THE CABLE BACK now (within {PULL_SECONDS:g} s)")
        _until(context, checked, lambda: _all_open(runtime), PULL_SECONDS, "not all rails came back", _PULL)
        counters = dataclasses.asdict(runtime.counters())
    seconds = round(time.monotonic() - started, 3)
    return Outcome(
        f"out and back within {seconds:.0f} s, {checked.done} collectives right",
        {"out_seconds": round(out, 3), "seconds": seconds, "counters": counters},
    )


@contextmanager
def _traffic(context: Context) -> Iterator[tuple[Runtime, CheckedCollectives]]:
    from vllm_spark.first_run.checked import CheckedCollectives

    try:
        with context.runtime() as runtime:
            yield runtime, CheckedCollectives(runtime, seed=6)
    except CollectiveError as error:
        raise StepFailedError(f"collectives failed while a rail was out ({error})", _BROKEN) from None


def _all_open(runtime: Runtime) -> bool:
    return all(state == "open" for state in runtime.counters().rail_states)


def _until(
    context: Context,
    checked: CheckedCollectives,
    condition: Callable[[], bool],
    seconds: float,
    seen: str,
    advice: Advice,
) -> None:
    """Runs collectives until `condition` holds on both machines.

    Raises:
        StepFailedError: it did not within `seconds`.
    """
    end = time.monotonic() + seconds
    while True:
        for _ in range(_BATCH):
            checked.run()
        checked.check()
        mine = _Seen(condition())
        theirs = context.swap(mine)
        if mine.enough and theirs.enough:
            return
        if time.monotonic() > end:
            states = ", ".join(checked.rail_states)
            raise StepFailedError(f"{seen} within {seconds:g} s (rails: {states})", advice)
