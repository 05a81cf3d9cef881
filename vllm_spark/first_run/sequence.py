"""The steps in their order, and how they are run on both machines together."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from vllm_spark.collective import CollectiveError
from vllm_spark.errors import PeerLostError, SparkError, described
from vllm_spark.first_run.context import Context
from vllm_spark.first_run.result import Outcome, Status, StepFailedError, StepResult
from vllm_spark.first_run.steps import collectives, healing, machine, pinning, rails, random_collectives


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: a name for the report, a title for the user, and its function."""

    name: str
    title: str
    run: Callable[[Context], Outcome]


@dataclasses.dataclass(frozen=True)
class _Done:
    """The end of a step, which both machines exchange; the figures are those of the sender."""

    step: str
    warning: str


def steps(context: Context) -> Iterator[Step]:
    """The steps in their order; those of the rails follow from what the step `machine` finds."""
    yield Step("machine", "This machine", machine.run)
    yield Step("pinning", "Memory for the network cards", pinning.run)
    for rail in range(len(context.rails)):
        title = f"{context.rail_name(rail)[0].upper()}{context.rail_name(rail)[1:]} alone"
        yield Step(f"rail {rail}", title, partial(rails.run_alone, rail=rail))
    if len(context.rails) > 1:
        yield Step("rails", "All rails together", rails.run_together)
    yield Step("two-way", "Both directions at once", rails.run_two_way)
    yield Step("packets", "Collectives of packets", collectives.run_packets)
    yield Step("payloads", "Collectives of payloads", collectives.run_payloads)
    yield Step("mixed", "Collectives of mixed sizes", collectives.run_mixed)
    yield Step("graphs", "Collectives in CUDA graphs", collectives.run_graphs)
    yield Step("clearing", "Clearing of slots", collectives.run_clearing)
    yield Step("healing", "Rails that fail", healing.run_healing)
    yield Step("pulling", "Cables that are pulled", healing.run_pulling)
    yield Step("random", "Random collectives", random_collectives.run)


def run_steps(context: Context, show: Callable[[StepResult], None]) -> Iterator[StepResult]:
    """Runs the steps until one fails here or on the other machine; yields and shows the result of each."""
    for step in steps(context):
        result = _run(context, step)
        show(result)
        yield result
        if result.status in ("failed", "stopped"):
            return


def _run(context: Context, step: Step) -> StepResult:
    started = time.monotonic()

    def result(status: Status, **fields: Any) -> StepResult:
        return StepResult(step.name, step.title, status, round(time.monotonic() - started, 3), **fields)

    try:
        outcome = step.run(context)
        theirs = context.swap(_Done(step.name, outcome.warning))
    except (SparkError, CollectiveError) as error:
        return _failed(context, step, error, result)
    except Exception as error:  # a fault of this program: it is sent to the other machine, and is in the report
        context.peer.fail(f"step {step.name} ({step.title}): {described(error)}")
        return result("failed", seen=f"{described(error)}; please report it")
    if outcome.skipped:
        return result("skipped", value=outcome.value)
    found: dict[str, Any] = {"value": outcome.value, "figures": outcome.figures}
    if outcome.warning:
        advice = outcome.advice
        explained = {"meaning": advice.meaning, "remedy": advice.remedy} if advice else {}
        return result("warning", seen=outcome.warning, **explained, **found)
    if theirs.warning:
        return result("warning", seen=f"{context.peer.name} warns: {theirs.warning}", **found)
    return result("passed", **found)


def _failed(
    context: Context, step: Step, error: SparkError | CollectiveError, result: Callable[..., StepResult]
) -> StepResult:
    """The result of a step that failed here, or because of the other machine."""
    failure = context.peer.failure
    if failure is not None and (str(failure) in str(error) or not isinstance(error, StepFailedError)):
        return result("stopped", seen=str(failure))  # it aborted what was under way here
    if isinstance(error, PeerLostError):
        return result("stopped", seen=str(error))
    context.peer.fail(f"step {step.name} ({step.title}): {error}")
    if isinstance(error, StepFailedError):
        return result("failed", seen=error.seen, meaning=error.advice.meaning, remedy=error.advice.remedy)
    return result("failed", seen=str(error))
