"""Rows of a FusedMoE table that repeat vLLM's own choice, so that untuned steps run as without the table.

They are valid for the version of vLLM that they were made with: another may choose differently.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from vllm_spark.compat.versions import source_version
from vllm_spark.kernels.finding import spans
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, has_default, pinned_rows, vllm_has_table, vllm_row
from vllm_spark.kernels.fused_moe.table import FusedMoeProvenance, FusedMoeShape
from vllm_spark.kernels.table import VLLM_DEFAULT, Provenance

_LARGEST_STEP = 16_384
"""Of tokens; the largest row is used for larger steps as well."""

_ITS_TABLE = "the table that comes with vLLM"


def rows_around(tuned: Container[int], largest: int, shape: FusedMoeExperts, device: str) -> dict[int, dict[str, int]]:
    """vLLM's choice for steps that are not in `tuned`: each up to `largest` tokens, and its changes above.

    Args:
        device: as in `devices.device_file_name`.
    """
    below = {tokens: vllm_row(shape, device, tokens) for tokens in range(1, largest + 1) if tokens not in tuned}
    return below | pinned_rows(shape, device, above=largest)


def vllm_rows_provenance(shape: FusedMoeExperts, device: str, versions: Mapping[str, str]) -> Provenance:
    """The provenance of such rows; `versions` are the installed ones."""
    if vllm_has_table(shape, device):
        source = f"{_ITS_TABLE} {versions.get('vllm', '')}".strip()
        return Provenance(kind="published", source=source, versions=dict(versions))
    return Provenance(kind="derived", rule=VLLM_DEFAULT, versions=dict(versions))


def repeats_vllm(row: Provenance) -> bool:
    """Whether a row is vLLM's choice: added around tuned rows, or measured without a faster one."""
    if row.kind == "measured":
        return row.gain == 0
    return row.rule == VLLM_DEFAULT or (row.source or "").startswith(_ITS_TABLE)


def outdated_rows(provenance: FusedMoeProvenance, vllm: str) -> dict[int, str]:
    """Rows that repeat the choice of another version of vLLM's source than `vllm`, with that version."""
    return {
        tokens: row.versions["vllm"]
        for tokens, row in provenance.rows.items()
        if repeats_vllm(row) and source_version(row.versions.get("vllm", vllm)) != source_version(vllm)
    }


def refreshed_rows(
    rows: Mapping[int, dict[str, int]], outdated: Container[int], shape: FusedMoeShape, device: str
) -> dict[int, dict[str, int]] | None:
    """The rows that are not `outdated`, filled up with the choice of the installed vLLM.

    None if no tuned row is left, or if vLLM's choice is not known: for int4 it depends on more than a table contains.
    """
    tuned = {tokens: row for tokens, row in rows.items() if tokens not in outdated}
    if not tuned or not has_default(shape):
        return None
    return dict(sorted((tuned | rows_around(tuned, max(tuned), _experts(shape), device)).items()))


def effective_rows(
    rows: Mapping[int, Mapping[str, int]], provenance: FusedMoeProvenance, shape: FusedMoeShape, device: str
) -> list[int]:
    """The rows that change a step: with parameters that the installed vLLM does not choose itself.

    For int4 vLLM's choice is not known, so each row that is not noted as vLLM's choice counts.
    """
    tuned = [tokens for tokens in rows if (source := provenance.rows.get(tokens)) is None or not repeats_vllm(source)]
    if not has_default(shape):
        return tuned
    experts, steps = _experts(shape), spans(rows, _LARGEST_STEP)
    return [
        tokens
        for tokens in tuned
        if any(
            _as_run(vllm_row(experts, device, step), shape) != _as_run(rows[tokens], shape)
            for step in range(steps[tokens][0], steps[tokens][1] + 1)
        )
    ]


def _as_run(row: Mapping[str, int], shape: FusedMoeShape) -> dict[str, int]:
    """The parameters as the kernel uses them: it reduces `BLOCK_SIZE_K` to the block of the weights."""
    used = {"SPLIT_K": 1, **row}
    if shape.block_shape is not None and "BLOCK_SIZE_K" in used:
        used["BLOCK_SIZE_K"] = min(used["BLOCK_SIZE_K"], *shape.block_shape)
    return used


def _experts(shape: FusedMoeShape) -> FusedMoeExperts:
    """Experts of this shape, of a format for which vLLM's choice depends neither on top_k nor on the model's width."""
    return FusedMoeExperts.model_validate(
        {
            "experts": shape.experts,
            "top_k": 1,
            "hidden": 1,
            "intermediate": shape.size_n,
            "dtype": shape.dtype,
            "block_shape": shape.block_shape,
        }
    )
