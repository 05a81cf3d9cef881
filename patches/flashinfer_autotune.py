"""Keeps FlashInfer's autotuner of a pair from a cache that only one rank can use.

vLLM 0.27 to 0.31 load rank 0's cache on both ranks. FlashInfer keeps entries of experts by rank: rank 0 finds its own
and does not tune, while rank 1 tunes and waits without end for rank 0 to measure with it (vLLM's issue 57423). With
these versions both ranks begin without a cache. vLLM 0.26 uses none with several ranks, and 0.32 one for each rank, if
all have theirs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch

_CHECKS_CACHES = "_all_ranks_have_matching_cache"
"""vLLM's own function, where it has one."""


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    def flashinfer_autotune(*args: Any, **kwargs: Any) -> Any:
        from vllm_spark.backend.process_group import pair_is_up

        names = original.__globals__
        if _CHECKS_CACHES in names or not pair_is_up():
            return original(*args, **kwargs)
        resolve = names["resolve_flashinfer_autotune_file"]
        with tempfile.TemporaryDirectory(prefix="vllm-spark-autotune-") as folder:
            names["resolve_flashinfer_autotune_file"] = lambda _: Path(folder) / "autotune_configs.json"
            try:
                return original(*args, **kwargs)
            finally:
                names["resolve_flashinfer_autotune_file"] = resolve

    return flashinfer_autotune


PATCH = Patch(
    name="flashinfer-autotune",
    anchor=Anchor("vllm.model_executor.warmup.kernel_warmup:flashinfer_autotune"),
    reason="vLLM 0.27 to 0.31 wait without end if rank 0 has a cache of FlashInfer's autotuner",
    feature="a start with FlashInfer's autotuning after the first one (start with --no-enable-flashinfer-autotune)",
    fingerprints={
        "b1b7b5aca090": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0",
        "5bde73bd35c4": "0.32.0, 0.33.0",
    },
    replace=_replace,
)
