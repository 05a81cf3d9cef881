"""vLLM's autotuning of FlashInfer's kernels on two ranks, of which rank 0 has a cache of an earlier start.

vLLM's function is that of a release whose source is fetched. In FlashInfer's place is a tuner with what the ranks'
agreement depends on: what is in its cache is not tuned, and each rank measures together with the other one. Both ranks
are threads.
"""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

from tests.unit.test_vllm_sources import ROOT, fetch_tool
from vllm_spark.backend import process_group
from vllm_spark.patches.flashinfer_autotune import PATCH

RELEASE = "0.29.0"
SECONDS = 5.0
"""How long a rank waits for the other one."""


class Ranks(threading.local):
    """vLLM's world group of both ranks, FlashInfer's AutoTuner of each thread's, and what that has tuned."""

    world_size = 2
    met = threading.Barrier(2)
    sent: ClassVar[dict[int, Any]] = {}  # one for both threads, as the barrier

    def begin(self, rank: int) -> None:
        self.rank_in_group, self.cpu_group = rank, self
        self.entries: dict[str, int] = {}
        self.tuned: list[str] = []

    def get(self) -> Ranks:
        return self

    def broadcast_object(self, mine: Any, src: int) -> Any:
        self.sent[self.rank_in_group] = mine
        self.barrier()
        return self.sent[src]

    def barrier(self) -> None:
        self.met.wait(SECONDS)

    def choose_one(self, operation: str) -> None:
        if operation not in self.entries:
            self.barrier()  # in place of the sum of both ranks' times
            self.entries[operation] = 1
            self.tuned.append(operation)

    def load_configs(self, path: str) -> bool:
        self.entries.update(json.loads(Path(path).read_text()))
        return True

    def save_configs(self, path: str) -> None:
        Path(path).write_text(json.dumps(self.entries))


def operations(rank: int) -> tuple[str, ...]:
    return "gemm", f"experts of rank {rank}"


@pytest.fixture
def autotune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Ranks, Callable[..., Any]]:
    """Both ranks, and that release's function."""
    found = fetch_tool().fetch((RELEASE,), ROOT / "build" / "vllm-sources")[RELEASE]
    if isinstance(found, Exception):
        pytest.skip(f"the sources of vLLM {RELEASE} cannot be had: {found}")
    ranks = Ranks()
    flashinfer = ModuleType("flashinfer.autotuner")
    vars(flashinfer).update(AutoTuner=ranks, set_autotune_process_group=lambda group: None)
    monkeypatch.setitem(sys.modules, "flashinfer.autotuner", flashinfer)
    monkeypatch.setattr("vllm.utils.flashinfer.autotune", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr("vllm.distributed.parallel_state.get_world_group", lambda: ranks)
    monkeypatch.setattr(process_group, "pair_is_up", lambda: True)
    log = logging.getLogger(__name__)
    monkeypatch.setattr(log, "info_once", log.info, raising=False)

    def run(_: Any) -> None:
        for operation in operations(ranks.rank_in_group):
            ranks.choose_one(operation)

    cache = tmp_path / "autotune_configs.json"
    cache.write_text(json.dumps(dict.fromkeys(operations(0), 1)))
    source = (found / "vllm" / "model_executor" / "warmup" / "kernel_warmup.py").read_text()
    (node,) = (each for each in ast.parse(source).body if getattr(each, "name", "") == "flashinfer_autotune")
    names: dict[str, Any] = {
        "torch": torch,
        "logger": log,
        "_flashinfer_autotune_skip_ops": lambda runner: None,
        "_run_flashinfer_autotune_dummy_runs": run,
        "resolve_flashinfer_autotune_file": lambda runner: cache,
        "write_flashinfer_autotune_cache": lambda path, contents: path.write_bytes(contents),
    }
    exec("from __future__ import annotations\n" + ast.unparse(node), names)
    return ranks, names["flashinfer_autotune"]


def start(ranks: Ranks, autotune: Callable[..., Any]) -> list[list[str]]:
    """What each rank tunes."""

    def tune(rank: int) -> list[str]:
        ranks.begin(rank)
        autotune(None)
        return ranks.tuned

    ranks.met.reset()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(tune, (0, 1)))


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_cache_of_rank_0_leaves_rank_1_waiting_without_the_patch(autotune: tuple[Ranks, Callable[..., Any]]) -> None:
    with pytest.raises(threading.BrokenBarrierError):
        start(*autotune)


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_with_the_patch_both_begin_without_a_cache(autotune: tuple[Ranks, Callable[..., Any]]) -> None:
    ranks, function = autotune
    assert start(ranks, PATCH.replace(function)) == [list(operations(0)), list(operations(1))]
