"""Tuned parameters in a process that runs a model for a pair: which tables it uses, and the lines that say so."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import apply_all
from vllm_spark.config.attachment import add_to_compile_key
from vllm_spark.errors import ConfigurationError
from vllm_spark.kernels import lookup
from vllm_spark.kernels.devices import DEVICES, Device, device_file_name
from vllm_spark.kernels.fused_moe import table as fused_moe
from vllm_spark.kernels.fused_moe.table import FusedMoeShape
from vllm_spark.kernels.fused_moe.vllm_rows import made_with_others, renewed
from vllm_spark.kernels.marlin import table as marlin
from vllm_spark.kernels.marlin.calls import MarlinCalls
from vllm_spark.kernels.marlin.table import MarlinTable, load_marlin_table

logger = logging.getLogger("vllm_spark")

_READ_TABLES = ("TritonExperts", "BatchedTritonExperts")
"""Classes of vLLM that run the kernel which reads FusedMoE tables; so do their subclasses."""

_READ_TABLES_AT_TIMES = "FallbackExperts"
"""A class of vLLM whose subclasses choose between that kernel and another one, call by call."""


_THIS_PROCESS = object()
_served: Any = None  # the configuration of the engine that uses tables now; None for none
_widths_with_atomic_add: frozenset[tuple[int, int]] = frozenset()


def start(vllm_config: Any = None) -> None:
    """Makes vLLM use tuned tables in this process, until `stop`. To be called before it loads a model.

    Args:
        vllm_config: the engine's, which learns what of the tables becomes part of compiled code; None if nobody
            calls `stop`.
    """
    global _served, _widths_with_atomic_add
    apply_all("tuning")
    _served = _THIS_PROCESS if vllm_config is None else vllm_config
    _forget_choices()
    if not has_tables(device_name()):
        logger.info("There are no tuned parameters for the device %s: vLLM's own stay.", device_name())
    _widths_with_atomic_add = layers_with_atomic_add()
    if vllm_config is not None and (digest := compiled_digest()) is not None:
        add_to_compile_key(vllm_config, "atomic_add", digest)


def stop(vllm_config: Any) -> None:
    """Gives vLLM its own choices back, if it is the engine of `vllm_config` that uses tables; else does nothing."""
    global _served, _widths_with_atomic_add
    if _served is vllm_config:
        _served = None
        _widths_with_atomic_add = frozenset()
        _forget_choices()


def is_active() -> bool:
    """Whether an engine of this process uses tuned tables now."""
    return _served is not None


def adds_atomically(size_n: int, size_k: int) -> bool:
    """Whether the tables say so of linear layers on Marlin with these widths. Compilers trace this."""
    return (size_n, size_k) in _widths_with_atomic_add


def compiled_digest() -> str | None:
    """Of what the tables change in compiled code: vLLM's compile cache must know it. None if they change nothing."""
    if not _widths_with_atomic_add:
        return None
    return hashlib.sha256(repr(sorted(_widths_with_atomic_add)).encode()).hexdigest()[:16]


@functools.cache
def device_name() -> str:
    """Of the device that vLLM uses in this process, as in names of tables. Starts nothing on the device."""
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
    """What tables change in calls of Marlin's operator for experts; None if none is for this device."""
    device = this_device()
    if not lookup.has_marlin_tables_for_experts(device.name):
        return None
    return MarlinCalls(list(inspect.signature(operator).parameters), device)


def layers_with_atomic_add() -> frozenset[tuple[int, int]]:
    """Widths of output and input of the linear layers on Marlin for which every row of every table says atomic add.

    All rows, because vLLM decides for a layer while it compiles it, when the number of rows has no value yet.
    """
    chosen: dict[str, MarlinTable] = {}
    for path in lookup.table_files(device_name(), marlin.FOLDER):
        if path.name.startswith("kernel=dense,") and path.name not in chosen:
            try:
                chosen[path.name] = load_marlin_table(path)
            except ConfigurationError as error:
                logger.warning("A tuned table is left out: %s.", error)
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
        logger.info("Marlin, linear layers with N=%d, K=%d: atomic add, as in their tables.", size_n, size_k)
    return widths_with


def choose_fused_moe_table(
    experts: int,
    size_n: int,
    dtype: str | None,
    block_n: int | None,
    block_k: int | None,
    of_vllm: Callable[[], dict[int, Any] | None],
) -> dict[int, Any] | None:
    """The table for the Triton kernel: of vLLM's variable first, then the user's own, then this project's, then vLLM's.

    Args:
        experts: of this rank.
        size_n: an expert's intermediate width on this rank.
        dtype: vLLM's name of the format.
        block_n: of weights that share a scale, if they do in blocks; None or 0 otherwise.
        block_k: likewise.
        of_vllm: looks where vLLM looks.
    """
    import vllm
    import vllm.envs as envs

    device = device_name()
    block_shape = (block_n, block_k) if block_n and block_k else None
    shape = FusedMoeShape(experts, size_n, dtype, block_shape)
    theirs = envs.VLLM_TUNED_CONFIG_FOLDER
    name = shape.file_name(device)
    if envs.VLLM_BATCH_INVARIANT:
        return of_vllm()
    if theirs is not None and os.path.exists(os.path.join(theirs, name)):
        logger.info("Triton, %s: as in %s (VLLM_TUNED_CONFIG_FOLDER).", name, theirs)
        return of_vllm()
    found = lookup.find_fused_moe_table(device, experts, size_n, dtype, block_shape)
    if found is None:
        return _left_to_vllm(name, of_vllm, "there is no table of this name" if has_tables(device) else None)
    path, rows, provenance = found
    if provenance.says_nothing and path.is_relative_to(lookup.shipped_folder()):
        return _left_to_vllm(name, of_vllm, f"the table in {path.parent} says no more than that")
    # The name of a table for int4 does not tell the group, which vLLM gives as a block's height.
    if dtype == "int4_w4a16" and block_k and provenance.group_size not in (None, block_k):
        why = f"the table in {path.parent} is for groups of {provenance.group_size}, not {block_k}"
        return _left_to_vllm(name, of_vllm, why)
    outdated = made_with_others(provenance, vllm.__version__)
    if outdated:
        versions = ", ".join(dict.fromkeys(outdated.values()))
        now = renewed(rows, outdated, shape, device)
        if now is None:
            why = f"the table in {path.parent} has rows that were the choice of vLLM {versions}; tune anew"
            return _left_to_vllm(name, of_vllm, why)
        logger.info("Triton, %s: of vLLM %s, not %s, are rows that nobody tuned.", name, vllm.__version__, versions)
        rows = now
    origins = dict.fromkeys(row.sentence() for row in provenance.rows.values())
    logger.info("Triton, %s: as in %s (%s).", name, path.parent, "; ".join(origins) or "of unknown origin")
    return dict(rows)


def _left_to_vllm(name: str, of_vllm: Callable[[], dict[int, Any] | None], why: str | None) -> dict[int, Any] | None:
    """vLLM's own table, or None for its rule; the log says so, and `why`, unless there is nothing to tell."""
    rows = of_vllm()
    reason = "" if why is None else f", for {why}"
    if rows is not None:
        logger.info("Triton, %s: the table that comes with vLLM%s.", name, reason)
    elif why is not None:
        logger.info("Triton, %s: as vLLM chooses%s.", name, reason)
    return rows


def tell_of_experts(worker: Any) -> None:
    """Says of each kind of experts in a loaded model whose kernel reads no table, or may not, that this is so.

    Those that read one say which when they first ask for it.

    Args:
        worker: vLLM's, with its model loaded.
    """
    try:
        modules = list(worker.get_model().modules())
    except (AttributeError, NotImplementedError):
        return  # a worker of another kind; nothing but a line in the log is lost
    kinds: Counter[type] = Counter()
    for module in modules:
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        if experts is None:
            continue
        kinds.update([type(experts)])
    for kind, layers in kinds.items():
        ancestors = {ancestor.__name__ for ancestor in kind.__mro__}
        if ancestors.intersection(_READ_TABLES):
            continue
        if "Marlin" in kind.__name__:
            what = "it reads Marlin's tables, and none for Triton"
        elif _READ_TABLES_AT_TIMES in ancestors:
            what = "it reads a table only for calls that it leaves to Triton"
        else:
            what = "it reads no table, vLLM's own choice stays"
        logger.info("Experts of %d layers run on %s: %s.", layers, kind.__name__, what)


def _forget_choices() -> None:
    """What was found stays for an engine: the next one looks anew, and so does vLLM."""
    lookup.forget()
    marlin_calls.cache_clear()
    module = sys.modules.get("vllm.model_executor.layers.fused_moe.fused_moe")
    clear = getattr(getattr(module, "get_moe_configs", None), "cache_clear", None)
    if clear is not None:
        clear()
