"""The step `random`: many random collectives, each checked, and a digest of all results that both ranks compare."""

from __future__ import annotations

import dataclasses
import time

from vllm_spark.first_run.context import Context
from vllm_spark.first_run.result import Outcome

DEFAULT_COLLECTIVES = {"cuda": 1_000_000, "cpu": 10_000}
_SEED = 20
_SAY_SECONDS = 5.0


def run(context: Context) -> Outcome:
    """Runs as many as the plan, or the default of the device, says."""
    from vllm_spark.first_run.checked import CheckedCollectives, compare_digests

    count = context.plan.collectives or DEFAULT_COLLECTIVES[context.device]
    with context.runtime() as runtime:
        checked = CheckedCollectives(runtime, _SEED)
        started = said = time.monotonic()
        while checked.done < count:
            checked.run()
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                context.say(f"{checked.done} of {count} random collectives")
        checked.check()
        seconds = time.monotonic() - started
        digest = compare_digests(context, checked)
        counters = dataclasses.asdict(runtime.counters())
    return Outcome(
        f"{count} collectives, digest {digest} on both",
        {"collectives": count, "digest": digest, "seconds": round(seconds, 3), "counters": counters},
    )
