"""The step `random`: many random collectives, each checked, and a digest of all results that both ranks compare."""

from __future__ import annotations

import dataclasses
import time

from vllm_spark.first_run.context import Context
from vllm_spark.first_run.result import Outcome

DEFAULT_COLLECTIVES = {"cuda": 1_000_000, "cpu": 10_000}
_SEED = 20
_NOTE_SECONDS = 5.0


def run(context: Context) -> Outcome:
    """Runs the number of the plan, or the default of the device."""
    from vllm_spark.first_run.checked import CheckedCollectives, compare_digests

    count = context.plan.collectives or DEFAULT_COLLECTIVES[context.device]
    with context.runtime() as runtime:
        checked = CheckedCollectives(runtime, _SEED)
        started = noted = time.monotonic()
        while checked.done < count:
            checked.run()
            if time.monotonic() - noted > _NOTE_SECONDS:
                noted = time.monotonic()
                context.note(f"{checked.done} of {count} random collectives")
        checked.check()
        seconds = time.monotonic() - started
        digest = compare_digests(context, checked)
        counters = dataclasses.asdict(runtime.counters())
    return Outcome(
        f"{count} collectives, digest {digest} on both",
        {"collectives": count, "digest": digest, "seconds": round(seconds, 3), "counters": counters},
    )
