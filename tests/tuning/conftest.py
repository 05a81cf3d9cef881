"""What the tests of kernels' parameters need: a GPU. Where there is none, they are skipped with the reason.

A folder of their own, because `tests/gpu` loads every kernel of every library before its first launch, and vLLM's
kernels, which drivers of newer GPUs compile when they load them, take ten minutes that way.
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "tests/tuning/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason="this machine has no CUDA device"))
