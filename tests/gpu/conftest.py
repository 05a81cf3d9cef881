"""What the tests on GPUs need; where there is none, or no kernels, they are skipped with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.native.emulated_nics import EmulatedNics
from tests.native.programs import Programs

# Left to the first launch, loading a kernel of torch waits for all that runs on the GPU: on one GPU, for the other
# rank's kernel, which waits for this rank.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

FOUR_KERNELS = 128
"""Multiprocessors: two kernels of each rank, of 32 blocks that fill one each (docs/testing.md)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _reason_to_skip()
    if reason is not None:
        for item in items:
            if "tests/gpu/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=reason))


def _reason_to_skip() -> str | None:
    import torch

    from vllm_spark.collective.cuda_runtime import KERNELS

    if not torch.cuda.is_available():
        return "this machine has no CUDA device"
    if not KERNELS.is_file():
        return "vllm_spark was built without nvcc and has no kernels"
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    if torch.cuda.device_count() == 1 and multiprocessors < FOUR_KERNELS:
        return f"both ranks would share a GPU of {multiprocessors} multiprocessors, and need {FOUR_KERNELS}"
    return None


@pytest.fixture(scope="session")
def nics_of_this_process(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> EmulatedNics:
    """Emulated NICs in the place of this process's own, for both ranks."""
    nics = EmulatedNics(tmp_path_factory.mktemp("nics"), programs.libibverbs("verbs_emulated.cpp"))
    nics.use_in_this_process()
    return nics


@pytest.fixture
def make_pair(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes connected pairs with the given options, and closes them.

    `launch` may be a shape for each rank. With the transport `verbs` the rails are `nics_of_this_process`.
    """
    from vllm_spark.bench.gpu_ranks import GpuPair
    from vllm_spark.collective import LaunchShape, RuntimeOptions

    pairs: list[GpuPair] = []

    def make(launch: tuple[LaunchShape | None, LaunchShape | None] = (None, None), **options: Any) -> GpuPair:
        if options.get("transport") == "verbs":
            request.getfixturevalue("nics_of_this_process")
        first, second = (RuntimeOptions(**{"timeout_s": 5.0, **options, "launch": shape}) for shape in launch)
        pairs.append(GpuPair((first, second)))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()
