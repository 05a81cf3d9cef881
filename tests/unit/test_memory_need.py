"""What a start needs, from vLLM's configuration, and the refusal by this machine. On vLLM's CPU build."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from vllm_spark.backend.memory_need import check_fits, memory_need, reserved_bytes
from vllm_spark.config.settings import SparkConfig, flags_named
from vllm_spark.errors import EXIT_REFUSED, RefusedError
from vllm_spark.memory.need import MemoryNeed
from vllm_spark.memory.scopes import GIB


def configuration(**changes: Any) -> Any:
    """The part of vLLM's that counts."""
    values: dict[str, Any] = {
        "stored": torch.bfloat16,
        "dtype": torch.bfloat16,
        "quantization": None,
        "kv_cache": None,
    } | changes
    return SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_memory_bytes=values["kv_cache"], gpu_memory_utilization=0.9),
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(dtype=values["stored"]),
            dtype=values["dtype"],
            quantization=values["quantization"],
            enforce_eager=False,
        ),
    )


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        ({}, 5 * GIB),
        ({"dtype": torch.float32}, 10 * GIB),
        ({"stored": "bfloat16", "dtype": torch.float32}, 10 * GIB),
        ({"stored": "torch.float32"}, 2.5 * GIB),
        ({"stored": None, "dtype": torch.float32}, 5 * GIB),
        ({"stored": "unheard-of", "dtype": torch.float32}, 5 * GIB),
        ({"quantization": "gptq", "dtype": torch.float32}, 5 * GIB),
    ],
)
def test_half_of_the_weights_as_vllm_converts_them(changes: dict[str, Any], weights: float) -> None:
    assert memory_need(configuration(**changes), SparkConfig(), 10 * GIB).weights == weights


def test_the_kv_cache_is_what_was_given_or_the_rest() -> None:
    given = memory_need(configuration(kv_cache=3 * GIB), SparkConfig(), 10 * GIB)
    rest = memory_need(configuration(), SparkConfig(), 10 * GIB)
    assert given.kv_cache_of(100 * GIB) == 3 * GIB
    assert rest.kv_cache_of(100 * GIB) == 90 * GIB - rest.weights - rest.graphs
    assert rest.kv_cache_of(GIB) == 0


def test_the_region_depends_on_the_settings() -> None:
    small, large = (
        memory_need(configuration(), SparkConfig(slot_kib=slot, depth=depth), 0).region
        for slot, depth in ((64, 1), (4096, 8))
    )
    assert 0 < small < large
    assert large > 2 * 8 * (4 << 20), "twice as many slots as chunks in flight"


def test_this_machine_refuses_what_it_does_not_have() -> None:
    check_fits(MemoryNeed(), SparkConfig(), "desk1")
    with pytest.raises(RefusedError, match=r"of desk1: .* GiB \(weights 9999\.0, ") as caught:
        check_fits(MemoryNeed(weights=9999 * GIB), SparkConfig(), "desk1")
    assert caught.value.exit_code == EXIT_REFUSED


def test_the_reserve_is_named_by_the_flag_of_the_command() -> None:
    config = SparkConfig(reserve_memory=1024)
    assert psutil.virtual_memory().total < 1024 * GIB
    with pytest.raises(RefusedError, match=r"desktop 1024\.0 by --spark-reserve-memory\)"):
        check_fits(MemoryNeed(), config, "desk1")
    with flags_named("--"), pytest.raises(RefusedError, match=r"desktop 1024\.0 by --reserve-memory\)"):
        check_fits(MemoryNeed(), config, "desk2")


def test_a_processor_has_no_desktop_beside_a_gpu() -> None:
    assert reserved_bytes(SparkConfig()) == 0
