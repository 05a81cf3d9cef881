"""Which tables of the Triton kernel vLLM reads by itself, and what it must be told to read the others."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_spark.compat import installed_vllm, triton_runs_int4_experts
from vllm_spark.errors import ConfigurationError
from vllm_spark.tuning.fused_moe_shape import FusedMoeExperts
from vllm_spark.tuning.outcome import Shape


def not_read_by_default(shape: FusedMoeExperts) -> str | None:
    """Why vLLM would not read its table on a GB10 unless told to, to follow "the table for ..."; None if it would.

    With `--moe-backend triton` it reads all of them.
    """
    if shape.is_int4:
        return "vLLM runs such experts on Marlin by itself"
    if shape.block_shape is not None:
        return "vLLM runs such experts on DeepGEMM by itself"
    if shape.dtype is None:
        return "vLLM runs such experts on FlashInfer's CUTLASS kernel by itself, where FlashInfer is installed"
    return None


def who_reads(shapes: Iterable[Shape]) -> list[str]:
    """Sentences about tables that vLLM does not read by itself."""
    return [
        f"Serve with --moe-backend triton, or the table for {shape.describe()} is not read: {reason}."
        for shape in shapes
        if isinstance(shape, FusedMoeExperts) and (reason := not_read_by_default(shape)) is not None
    ]


def backend(shapes: Iterable[Shape]) -> dict[str, str]:
    """Arguments of an engine that reads the tables of these shapes; a model has one backend for all of its experts."""
    return {"moe_backend": "triton"} if all(isinstance(shape, FusedMoeExperts) for shape in shapes) else {}


def check_version_takes_int4(shapes: Iterable[Shape]) -> None:
    """Raises ConfigurationError for int4 experts that the installed vLLM would run on Marlin, whatever it is told."""
    if any(isinstance(shape, FusedMoeExperts) and shape.is_int4 for shape in shapes) and not triton_runs_int4_experts():
        raise ConfigurationError(
            f"vLLM {installed_vllm()} runs int4 experts on Marlin alone; leave --kernels triton out, or use a later "
            "vLLM"
        )
