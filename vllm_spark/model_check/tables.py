"""The finding about tuned tables of kernels' parameters that apply to a model on a pair of GB10."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_spark.doctor.finding import Finding
from vllm_spark.models.layers import Experts, Layer
from vllm_spark.models.weights import Nvfp4
from vllm_spark.tune.coverage import Use, uses_of


def check_tables(name: str, layers: Sequence[Layer]) -> Finding:
    """Which tables serving uses for the model's experts.

    Args:
        name: of the model.
        layers: of one rank.
    """
    title = "Tuned tables for its kernels"
    experts = [layer for layer in layers if isinstance(layer, Experts)]
    if not experts:
        return Finding("model.tables", title, "not applicable", "it has no experts, whose kernels alone have tables")
    uses = uses_of((name, "NVFP4" if isinstance(layer.weights, Nvfp4) else layer) for layer in experts)
    tuned = [use for use in uses if use.table is not None]
    if tuned:
        return Finding("model.tables", title, "ok", "; ".join(f"{use.shape}: {use.what}" for use in tuned))
    searched = any("does not search" not in use.why and "reads no table" not in use.why for use in uses)
    return Finding(
        "model.tables",
        title,
        "note" if searched else "ok",
        "none, vLLM's own choice",
        _reasons(uses) + ". What a table is worth in tokens per second the tuner measures." if searched else "",
        f"vllm-spark tune {name}   # on a GB10, while nothing else runs" if searched else "",
    )


def _reasons(uses: Sequence[Use]) -> str:
    """Why there are none, each reason once."""
    counted = dict.fromkeys(use.why.partition(";")[0] for use in uses)
    joined = "; ".join(counted)
    return joined[:1].upper() + joined[1:]
