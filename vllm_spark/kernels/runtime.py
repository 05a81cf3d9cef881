"""Tuned parameters in a process that runs a model: switches them on and off, selects tables, and logs the selection."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from vllm_spark.compat.patching import apply_all, remove
from vllm_spark.compat.versions import vllm_source
from vllm_spark.config.attachment import add_to_compile_key
from vllm_spark.errors import ConfigurationError
from vllm_spark.kernels import lookup
from vllm_spark.kernels.devices import DEVICES, Device, device_file_name
from vllm_spark.kernels.fused_moe import table as fused_moe
from vllm_spark.kernels.fused_moe.table import FusedMoeShape
from vllm_spark.kernels.fused_moe.vllm_rows import effective_rows, outdated_rows, refreshed_rows
from vllm_spark.kernels.marlin import table as marlin
from vllm_spark.kernels.marlin.layers import may_use
from vllm_spark.kernels.marlin.table import MarlinTable, load_marlin_table
from vllm_spark.kernels.marlin.tile_choice import MarlinCalls
from vllm_spark.kernels.table import origins

logger = logging.getLogger("vllm_spark")

_TABLE_READERS = ("TritonExperts", "BatchedTritonExperts")
"""vLLM's classes whose kernel reads FusedMoE tables; their subclasses read them as well."""

_FALLBACK_BASE = "FallbackExperts"
"""vLLM's class whose subclasses choose between that kernel and another one for each call."""

_FUSED_MOE_PATCH, _MARLIN_PATCH, _ATOMIC_ADD_PATCH = "fused-moe-tables", "marlin-parameters", "marlin-atomic-add"

_WHOLE_PROCESS = object()
_active: Any = None  # configuration of the engine that uses tables now
_widths_with_atomic_add: frozenset[tuple[int, int]] = frozenset()
_in_use: dict[str, str] = {}  # the folder of each table that was selected, by its name


def tables_in_use() -> list[str]:
    """The tables that this process has selected for its model so far, each with its folder."""
    return [f"{name} ({folder})" for name, folder in _in_use.items()]


def start(vllm_config: Any = None) -> None:
    """Makes vLLM use tuned tables in this process, until `stop`. Must be called before a model is loaded.

    Args:
        vllm_config: the engine's, to which values that tables put into compiled code are added; None for a process
            that uses tables until it exits.
    """
    global _active, _widths_with_atomic_add
    apply_all("tuning", {_FUSED_MOE_PATCH})
    _active = _WHOLE_PROCESS if vllm_config is None else vllm_config
    _clear_caches()
    if not has_tables(device_name()):
        logger.info("No tuned table for the device %s; vLLM's own parameters are used.", device_name())
    _widths_with_atomic_add = layers_with_atomic_add()
    if _widths_with_atomic_add:
        apply_all("tuning", {_ATOMIC_ADD_PATCH})
    if vllm_config is None and lookup.marlin_tables_for_experts(device_name()):
        apply_all("tuning", {_MARLIN_PATCH})  # the layers are not known here
    if vllm_config is not None and (digest := compiled_digest()) is not None:
        add_to_compile_key(vllm_config, "atomic_add", digest)


def stop(vllm_config: Any) -> None:
    """Stops the use of tables, if the engine of `vllm_config` uses them; else does nothing."""
    global _active, _widths_with_atomic_add
    if _active is vllm_config:
        _active = None
        _widths_with_atomic_add = frozenset()
        for name in (_MARLIN_PATCH, _ATOMIC_ADD_PATCH):
            remove(name)
        _clear_caches()


def is_active() -> bool:
    """Whether an engine of this process uses tuned tables now."""
    return _active is not None


def uses_atomic_add(size_n: int, size_k: int) -> bool:
    """Whether Marlin's linear layers with these widths use atomic adds. torch.compile traces this."""
    return (size_n, size_k) in _widths_with_atomic_add


def compiled_digest() -> str | None:
    """Digest of the values that tables put into compiled code, for the key of vLLM's compile cache; None if none."""
    if not _widths_with_atomic_add:
        return None
    return hashlib.sha256(repr(sorted(_widths_with_atomic_add)).encode()).hexdigest()[:16]


@functools.cache
def device_name() -> str:
    """Name of the device that vLLM uses in this process, as in names of tables. Does not initialize the device."""
    from vllm.platforms import current_platform

    return device_file_name(str(current_platform.get_device_name()))


@functools.cache
def this_device() -> Device:
    """Limits of the device that vLLM uses in this process, which must be a GPU."""
    name = device_name()
    if name in DEVICES:
        return DEVICES[name]
    import torch

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(
        name=name,
        capability=(found.major, found.minor),
        multiprocessors=found.multi_processor_count,
        shared_bytes=found.shared_memory_per_block_optin,
        threads_per_multiprocessor=found.max_threads_per_multi_processor,
    )


def has_tables(device: str) -> bool:
    """Whether any table is for `device`."""
    return any(lookup.table_files(device, kind) for kind in (marlin.FOLDER, fused_moe.FOLDER))


@functools.cache
def marlin_calls(operator: Callable[..., Any]) -> MarlinCalls | None:
    """Overrides by tables in calls of Marlin's operator for experts; None if no table changes a call on this device."""
    device = this_device()
    tables = lookup.marlin_tables_for_experts(device.name)
    if not tables:
        return None
    widths = {(table.shape.size_n, table.shape.size_k) for table in tables}
    return MarlinCalls(list(inspect.signature(operator).parameters), device, widths)


def layers_with_atomic_add() -> frozenset[tuple[int, int]]:
    """Output and input widths of Marlin's linear layers for which every row of every table uses atomic adds.

    All rows must agree, because vLLM decides when it compiles a layer, before the number of rows is known.
    """
    chosen: dict[str, MarlinTable] = {}
    for path in lookup.table_files(device_name(), marlin.FOLDER):
        if path.name.startswith("kernel=dense,") and path.name not in chosen:
            try:
                chosen[path.name] = load_marlin_table(path)
            except ConfigurationError as error:
                logger.warning("Ignoring a tuned table: %s.", error)
    from vllm_spark.backend.platform import compute_capability

    agreed: dict[tuple[int, int], bool] = {}
    for table in chosen.values():
        widths = (table.shape.size_n, table.shape.size_k)
        agreed[widths] = agreed.get(widths, True) and all(row.use_atomic_add for row in table.rows.values())
    widths_with = frozenset(widths for widths, yes in agreed.items() if yes)
    # Before compute capability 9.0 there is no such instruction for bfloat16.
    if not widths_with or (compute_capability() or (0, 0)) < (9, 0):
        return frozenset()
    for size_n, size_k in sorted(widths_with):
        logger.info("Tuned Marlin tables: linear layers with N=%d, K=%d use atomic adds.", size_n, size_k)
    return widths_with


def choose_fused_moe_table(
    experts: int,
    size_n: int,
    dtype: str | None,
    block_n: int | None,
    block_k: int | None,
    vllm_lookup: Callable[[], dict[int, Any] | None],
) -> dict[int, Any] | None:
    """The rows for the Triton kernel; None if vLLM's rule applies.

    They come from the first of: VLLM_TUNED_CONFIG_FOLDER, the user's tables, this project's tables, vLLM's tables.

    Args:
        experts: of this rank.
        size_n: an expert's intermediate width on this rank.
        dtype: vLLM's name of the format.
        block_n: of weights that share a scale, if they do in blocks; None or 0 otherwise.
        block_k: likewise.
        vllm_lookup: vLLM's own look-up.
    """
    import vllm.envs as envs

    device = device_name()
    block_shape = (block_n, block_k) if block_n and block_k else None
    shape = FusedMoeShape(experts, size_n, dtype, block_shape)
    theirs = envs.VLLM_TUNED_CONFIG_FOLDER
    name = shape.file_name(device)
    if envs.VLLM_BATCH_INVARIANT:
        return vllm_lookup()
    if theirs is not None and os.path.exists(os.path.join(theirs, name)):
        logger.info("Triton table %s: from %s (VLLM_TUNED_CONFIG_FOLDER).", name, theirs)
        return vllm_lookup()
    found = lookup.find_fused_moe_table(device, experts, size_n, dtype, block_shape)
    if found is None:
        return _fall_back(name, vllm_lookup, "no tuned table has this name" if has_tables(device) else None)
    path, stored, provenance = found
    effective = effective_rows(stored, provenance, shape, device)
    if not effective and path.is_relative_to(lookup.shipped_folder()):
        return _fall_back(name, vllm_lookup, f"the table in {path.parent} only repeats vLLM's choice")
    # A table's name does not contain the group size of int4, which vLLM passes as block_k.
    if dtype == "int4_w4a16" and block_k and provenance.group_size not in (None, block_k):
        why = f"the table in {path.parent} is for groups of {provenance.group_size}, not {block_k}"
        return _fall_back(name, vllm_lookup, why)
    outdated = outdated_rows(provenance, vllm_source())
    rows = _refreshed(stored, outdated, shape, device)
    if rows is None:
        versions = ", ".join(dict.fromkeys(outdated.values()))
        why = f"the table in {path.parent} has default rows of vLLM {versions}; tune again"
        return _fall_back(name, vllm_lookup, why)
    _in_use[name] = str(path.parent)
    logger.info(
        "Triton table %s: from %s (%s; other rows are vLLM's choice).",
        name,
        path.parent,
        origins(provenance.rows.get(tokens) for tokens in effective),
    )
    return dict(rows)


def _refreshed(
    rows: dict[int, dict[str, int]], outdated: dict[int, str], shape: FusedMoeShape, device: str
) -> dict[int, dict[str, int]] | None:
    """The rows with the installed vLLM's choice in place of an earlier version's; None if its choice is not known."""
    if not outdated:
        return rows
    now = refreshed_rows(rows, outdated, shape, device)
    if now is not None:
        versions = ", ".join(dict.fromkeys(outdated.values()))
        logger.info(
            "Triton table %s: default rows of vLLM %s were replaced by those of %s.",
            shape.file_name(device),
            versions,
            vllm_source(),
        )
    return now


def _fall_back(name: str, vllm_lookup: Callable[[], dict[int, Any] | None], why: str | None) -> dict[int, Any] | None:
    """vLLM's own table, or None for its rule; logs which one is used, and `why`."""
    rows = vllm_lookup()
    reason = "" if why is None else f": {why}"
    if rows is not None:
        logger.info("Triton table %s: the table that comes with vLLM is used%s.", name, reason)
    elif why is not None:
        logger.info("Triton table %s: vLLM's default is used%s.", name, reason)
    return rows


def model_loaded(worker: Any) -> None:
    """Replaces Marlin's operator for experts if a layer of a loaded model may have a tuned row, and logs what is used.

    Without such a layer vLLM calls its own function, at no cost. Tables of the Triton kernel are logged when vLLM
    selects them.

    Args:
        worker: vLLM's, with its model loaded.
    """
    kinds: Counter[type] = Counter()
    tables = lookup.marlin_tables_for_experts(device_name())
    hook = False
    for experts in _experts_of(worker):
        if experts is None:
            hook = True  # vLLM calls the operator in a way that is not known here
            continue
        kinds[type(experts)] += 1
        hook = hook or ("Marlin" in type(experts).__name__ and any(may_use(experts, table.shape) for table in tables))
    if hook and tables:
        apply_all("tuning", {_MARLIN_PATCH})
        _in_use["Marlin tables for experts"] = device_name()
    else:
        remove(_MARLIN_PATCH)
    for kind, layers in kinds.items():
        ancestors = {ancestor.__name__ for ancestor in kind.__mro__}
        if ancestors.intersection(_TABLE_READERS):
            continue
        if "Marlin" in kind.__name__:
            what = (
                "uses Marlin tables, not FusedMoE tables"
                if hook and tables
                else f"has no tuned table for its shapes on {device_name()}; vLLM's own choice is used"
            )
        elif _FALLBACK_BASE in ancestors:
            what = "uses FusedMoE tables only for calls that it passes to Triton"
        else:
            what = "does not use tables, vLLM's own choice stays"
        logger.info("Experts of %d layer%s: %s %s.", layers, "s" if layers > 1 else "", kind.__name__, what)


def _experts_of(worker: Any) -> Iterator[Any]:
    """The experts' kernels of the model and of its draft model; None for one that cannot be determined."""
    try:
        models = [worker.get_model()]
    except (AttributeError, NotImplementedError):
        yield None  # a worker of another kind
        return
    runner = getattr(worker, "model_runner", None)
    drafts = (getattr(getattr(runner, name, None), "model", None) for name in ("drafter", "speculator"))
    models += [model for model in drafts if callable(getattr(model, "modules", None))]
    for module in {id(module): module for model in models for module in model.modules()}.values():
        method = getattr(module, "quant_method", None)
        kernel = getattr(method, "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        if experts is not None:
            yield experts
        elif "MoE" in type(method).__name__:
            yield None


def _clear_caches() -> None:
    """Makes the next engine, and vLLM, read tables again."""
    _in_use.clear()
    lookup.clear_cache()
    marlin_calls.cache_clear()
    module = sys.modules.get("vllm.model_executor.layers.fused_moe.fused_moe")
    clear = getattr(getattr(module, "get_moe_configs", None), "cache_clear", None)
    if clear is not None:
        clear()
