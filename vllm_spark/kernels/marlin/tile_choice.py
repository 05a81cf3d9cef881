"""Chooses tiles for the calls of Marlin's kernel for experts, by the shapes of each call."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from typing import Any

from vllm_spark.kernels.devices import Device
from vllm_spark.kernels.lookup import find_marlin_table
from vllm_spark.kernels.marlin.rules import Gemm, Tile, blocks_fault
from vllm_spark.kernels.marlin.table import Kernel, MarlinParameters, MarlinShape, MarlinTable
from vllm_spark.kernels.table import origins

logger = logging.getLogger("vllm_spark")

Key = tuple[Any, ...]

_NONE: Mapping[str, int | bool] = {}


class MarlinCalls:
    """Selects parameters for calls of `moe_wna16_marlin_gemm`, and logs the selection once for each shape.

    A call costs one look-up in a dictionary, of its widths alone if no table has them. Tables are read and checked at
    the first call of a shape.

    Args:
        parameters: names of the operator's parameters, in order; versions of vLLM differ.
        device: that the kernel runs on.
        widths: output and input width of each table that changes a call; None for any.
    """

    def __init__(
        self, parameters: Sequence[str], device: Device, widths: Container[tuple[int, int]] | None = None
    ) -> None:
        self._places = {name: place for place, name in enumerate(parameters)}
        self._device = device
        self._widths = widths
        self._without: set[tuple[int, int]] = set()  # widths that no table has, and that were logged
        self._known: dict[Key, Mapping[str, int | bool]] = {}
        self._logged: set[MarlinShape] = set()

    def overrides(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, int | bool]:
        """The arguments that a table sets differently from vLLM; empty if the call stays unchanged."""
        widths = (kwargs["size_n"], kwargs["size_k"])
        if widths in self._without:
            return _NONE
        key = (
            kwargs["size_m"],
            kwargs["size_n"],
            kwargs["size_k"],
            kwargs["top_k"],
            kwargs["moe_block_size"],
            kwargs["b_q_type"].id,  # the type's own hash takes longer than all the rest
            self._argument("b_scales", args, kwargs).shape,
            self._argument("topk_weights", args, kwargs).shape,
            self._argument("workspace", args, kwargs).numel(),
            self._argument("a_scales", args, kwargs) is None and not self._is_ordered(args, kwargs),
        )
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._choose(key, str(kwargs["b_q_type"]))
            if self._widths is not None and widths not in self._widths:
                self._without.add(widths)
        return known

    def _argument(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        place = self._places[name]
        return args[place] if place < len(args) else kwargs[name]

    def _is_ordered(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether weights are in act-order, which newer versions of vLLM do not support."""
        order = self._argument("g_idx", args, kwargs) if "g_idx" in self._places else None
        return order is not None and order.shape[-1] > 0

    def _choose(self, key: Key, quant_type: str) -> Mapping[str, int | bool]:
        size_m, size_n, size_k, top_k, block_size_m, _, (experts, groups, _), routed, workspace, is_plain = key
        if not is_plain or len(routed) != 2:
            return {}  # 8-bit inputs or act-order weights: other kernels
        rows, experts_of_a_token = routed
        kernels: list[Kernel] = []
        if (size_m, top_k) == (rows, experts_of_a_token):
            kernels.append("moe_w13")
        if (size_m, top_k) == (rows * experts_of_a_token, 1):
            kernels.append("moe_w2")
        shapes = [
            MarlinShape(
                kernel=kernel,
                experts=experts,
                top_k=experts_of_a_token,
                size_n=size_n,
                size_k=size_k,
                group_size=group_size,
                quant_type=quant_type,
            )
            for kernel in kernels
            # For one group, the kernel has a group size of -1; the table may have size_k.
            for group_size in ((size_k // groups,) if groups > 1 else (-1, size_k))
        ]
        for shape in shapes:
            found = find_marlin_table(self._device.name, shape)
            if found is None:
                continue
            path, table = found
            self._log_table(shape, str(path), table)
            row = table.row(rows)
            if row is None:
                return {}
            if fault := self._fault(row, shape, block_size_m, workspace):
                logger.warning("Ignoring tuned parameters for %d rows in %s: %s.", rows, path, fault)
                return {}
            return _arguments(row)
        if shapes:
            self._log_default(shapes[0])
        return {}

    def _fault(self, row: MarlinParameters, shape: MarlinShape, block_size_m: int, workspace: int) -> str | None:
        """Why the parameters cannot be used for this call; None if they can."""
        if row.block_size_m is not None and row.block_size_m != block_size_m:
            return f"they are for block_size_m={row.block_size_m}, and vLLM uses block_size_m={block_size_m} here"
        if row.uses_default_tile:
            return None
        gemm = Gemm(True, shape.size_n, shape.size_k, shape.group_size, shape.quant_type, block_size_m)
        if fault := blocks_fault(row.blocks, Tile.requested(row.thread_k, row.thread_n), gemm, self._device):
            return fault
        if (locks := row.blocks * self._device.multiprocessors) > workspace:
            return f"{row.blocks} blocks for each multiprocessor need {locks} locks, and vLLM allocates {workspace}"
        return None

    def _log_table(self, shape: MarlinShape, path: str, table: MarlinTable) -> None:
        if shape not in self._logged:
            self._logged.add(shape)
            effective = table.effective_rows
            logger.info(
                "Marlin table for %s: %s (%s); other steps use vLLM's default.",
                describe(shape),
                path,
                origins(table.rows[rows].provenance for rows in effective),
            )

    def _log_default(self, shape: MarlinShape) -> None:
        if shape not in self._logged:
            self._logged.add(shape)
            logger.info(
                "No tuned Marlin table for %s on %s; vLLM's default is used.", describe(shape), self._device.name
            )


def describe(shape: MarlinShape) -> str:
    """A shape as text, for the log."""
    what = {"moe_w13": "gate and up", "moe_w2": "down", "dense": "linear layer"}[shape.kernel]
    experts = "" if shape.kernel == "dense" else f" of {shape.experts} experts, top {shape.top_k}"
    groups = "whole columns" if shape.group_size == -1 else f"groups of {shape.group_size}"
    return f"{what}{experts} (N={shape.size_n}, K={shape.size_k}, {shape.quant_type}, {groups})"


def _arguments(row: MarlinParameters) -> Mapping[str, int | bool]:
    """The arguments that differ from vLLM's call."""
    chosen: dict[str, int | bool] = {}
    if not row.uses_default_tile:
        chosen |= {"thread_k": row.thread_k, "thread_n": row.thread_n, "blocks_per_sm": row.blocks_per_sm}
    # The kernel clears the output itself before it adds to it.
    if row.use_atomic_add:
        chosen["use_atomic_add"] = True
    if not row.use_fp32_reduce:
        chosen["use_fp32_reduce"] = False
    return chosen
