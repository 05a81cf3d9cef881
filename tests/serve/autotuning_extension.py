"""A vLLM worker extension for tests: both ranks' warm-up ends with vLLM's FlashInfer autotuning, on a CPU.

vLLM's function is the real one, as are the model's steps in it, the process group and the collectives. In FlashInfer's
place is a stand-in with what the ranks' agreement depends on: an operation whose entry is in the tuner's cache is not
tuned, and the time of each tactic is averaged over both ranks. Entries of experts are of one rank, others of both.

Environment:

    TUNED_RANK  the rank that has all entries from the beginning, without vLLM's knowledge; empty: none
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from vllm.v1.worker.worker_base import WorkerWrapperBase

TACTICS = 4


class Tuner:
    """FlashInfer's AutoTuner."""

    group: Any = None

    def __init__(self) -> None:
        self.entries: dict[str, int] = {}
        self._dirty = False

    @staticmethod
    def get() -> Tuner:
        return tuner

    def choose_one(self, operation: str) -> None:
        """Tunes an operation, if it is not in the cache."""
        if operation in self.entries:
            return
        for tactic in range(TACTICS):
            time = torch.tensor([float(tactic)])
            if Tuner.group is not None:
                torch.distributed.all_reduce(time, group=Tuner.group)
        self.entries[operation], self._dirty = 0, True
        print(f"tuned {operation}", flush=True)

    def load_configs(self, path: str) -> bool:
        self.entries.update(json.loads(Path(path).read_text())["entries"])
        return True

    def save_configs(self, path: str) -> None:
        Path(path).write_text(json.dumps({"entries": self.entries}))

    def clear_cache(self) -> None:
        self.entries.clear()


def set_autotune_process_group(group: Any) -> None:
    Tuner.group = group


@contextlib.contextmanager
def autotune(*_: Any, **__: Any) -> Iterator[None]:
    yield


def module(name: str, **members: Any) -> None:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(members)
    sys.modules[name] = made


def operations(rank: int) -> tuple[str, ...]:
    return "gemm", f"experts of rank {rank}"


def tune(self: WorkerWrapperBase) -> Any:
    """vLLM's warm-up, and then its autotuning."""
    from vllm.model_executor.warmup.kernel_warmup import flashinfer_autotune
    from vllm.utils.flashinfer import has_flashinfer, has_flashinfer_cubin

    result = self.worker.compile_or_warm_up_model()
    module("flashinfer")
    module("flashinfer_cubin")
    module(
        "flashinfer.autotuner",
        AutoTuner=Tuner,
        autotune=autotune,
        set_autotune_process_group=set_autotune_process_group,
    )
    module("flashinfer.fused_moe")
    module("flashinfer.fused_moe.utils", get_hybrid_num_tokens_buckets=lambda tokens: (tokens,))
    for look in (has_flashinfer, has_flashinfer_cubin):
        look.cache_clear()
    rank = self.global_rank
    if os.environ.get("TUNED_RANK") == str(rank):
        tuner.entries.update(dict.fromkeys(operations(rank), 0))
    runner = self.worker.model_runner
    run = runner._dummy_run

    def run_tuned(*args: Any, **kwargs: Any) -> Any:
        for operation in operations(rank):
            tuner.choose_one(operation)
        return run(*args, **kwargs)

    runner._dummy_run = run_tuned
    flashinfer_autotune(runner)
    del runner._dummy_run
    return result


tuner = Tuner()
WorkerWrapperBase.compile_or_warm_up_model = tune


class Autotuning:
    """Adds nothing."""
