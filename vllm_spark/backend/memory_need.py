"""What a rank of this engine allocates, from vLLM's configuration, and the memory that vLLM takes it from."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from vllm.platforms import current_platform

from vllm_spark.config.settings import SparkConfig, flag_name
from vllm_spark.errors import RefusedError
from vllm_spark.memory.need import MemoryNeed, graphs_and_activations, refusal
from vllm_spark.memory.scopes import container_memory, read_scopes
from vllm_spark.ranks import WORLD_SIZE

_LARGEST_PACKETS = 128 << 10  # bytes; the largest default of the LL protocol's limit


def memory_need(vllm_config: Any, config: SparkConfig, weights: int) -> MemoryNeed:
    """What each rank allocates of its machine's memory; on a GPU with memory of its own the region alone.

    Args:
        vllm_config: vLLM's configuration of the engine.
        config: the settings.
        weights: bytes of all weight files, of the draft model's too.
    """
    from vllm_spark._native import region_bytes

    packets = _LARGEST_PACKETS if config.packet_kib is None else config.packet_kib << 10
    slot = config.slot_kib << 10
    region = region_bytes(slot_bytes=slot, packet_bytes=min(packets, slot), depth=config.depth)
    if not shares_memory():
        return MemoryNeed(region=region)
    cache, model = vllm_config.cache_config, vllm_config.model_config
    graphs = graphs_and_activations(gpu=current_platform.is_cuda(), eager=model.enforce_eager)
    return MemoryNeed(
        weights=int(weights * _widening(model)) // WORLD_SIZE,
        graphs=graphs,
        region=region,
        kv_cache=cache.kv_cache_memory_bytes,
        utilization=cache.gpu_memory_utilization,
    )


def check_fits(need: MemoryNeed, config: SparkConfig, host: str) -> None:
    """Checks that this machine has the memory for a rank, and for its desktop.

    Args:
        need: what the rank allocates.
        config: this machine's settings.
        host: its name.

    Raises:
        RefusedError: it has not; the sentence has the sum.
    """
    # vLLM's CPU build respects a container's limit, and a GPU's driver does not.
    memory = container_memory() if current_platform.is_cpu() else psutil.virtual_memory().total
    sentence = refusal(need, read_scopes(), memory, reserved_bytes(config), host, flag_name("reserve_memory"))
    if sentence is not None:
        raise RefusedError(sentence)


def reserved_bytes(config: SparkConfig) -> int:
    """What the settings, or their default for this machine, keep free on it."""
    return config.reserved_bytes(unified=current_platform.is_cuda() and shares_memory())


def shares_memory() -> bool:
    """Whether a rank's weights and KV cache are in the machine's memory: on a CPU, and on a GPU without its own."""
    if not current_platform.is_cuda():
        return True
    return bool(torch.cuda.get_device_properties(torch.cuda.current_device()).is_integrated)


def _widening(model: Any) -> float:
    """How many times larger weights are in memory than in their files, if vLLM converts unquantized ones."""
    stored = getattr(model.hf_text_config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored.removeprefix("torch."), None)
    if model.quantization is not None or not isinstance(stored, torch.dtype) or not stored.is_floating_point:
        return 1.0
    return float(model.dtype.itemsize / stored.itemsize)
