"""The step `pinning`: memory of the real size is registered with each network card, and with the GPU."""

from __future__ import annotations

from vllm_spark.collective import CollectiveError
from vllm_spark.first_run.context import Context
from vllm_spark.first_run.result import Advice, Outcome, StepFailedError

_ADVICE = Advice(
    "collectives have no memory that the network card may access",
    "raise the limit of locked memory (ulimit -l unlimited) and, on a GB10, boot with kho=off; vllm-spark doctor shows "
    "both",
)


def run(context: Context) -> Outcome:
    """Registers the region with each rail alone, and then with all of them, as the product does."""
    size = 0
    groups = [[index] for index in range(len(context.rails))]
    for indexes in [*groups, *([list(range(len(context.rails)))] if len(groups) > 1 else [])]:
        names = " and ".join(context.rail_name(index) for index in indexes)
        context.note(f"registering memory with {names}")
        try:
            size = context.kind.pin(context.rank, context.options, [context.rails[index] for index in indexes])
        except CollectiveError as error:
            raise StepFailedError(f"memory could not be registered with {names} ({error})", _ADVICE) from None
    with_gpu = " and with the GPU" if context.device == "cuda" else ""
    return Outcome(
        f"{size / 1e6:.1f} MB with {len(context.rails)} rails{with_gpu}",
        {"region_bytes": size, "rails": len(context.rails)},
    )
