"""Speculation with a temperature on vLLM's CPU build: each token has its request's sampling parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vllm_spark.compat.patching import all_patches

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's module, as it is in the process of a rank, and new tensors that are full of garbage."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    from vllm.v1.sample import rejection_sampler

    for each in all_patches():
        if each.anchor.module == rejection_sampler.__name__:
            name = each.anchor.qualified_name
            monkeypatch.setattr(rejection_sampler, name, each.replace(getattr(rejection_sampler, name)))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # then `new_empty` gives NaN, or the largest integer
    yield rejection_sampler
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("values", "replacement", "expected"),
    [
        (lambda: torch.tensor([0.8, 0.0, 0.5]), 1, [0.8, 0.8, 1.0, 0.5, 0.5, 0.5]),
        (lambda: torch.tensor([0.9, 0.1, 0.0]), 0, [0.9, 0.9, 0.1, 0.0, 0.0, 0.0]),
        (lambda: torch.tensor([7, 0, 2000], dtype=torch.int32), 0, [7, 7, 0, 2000, 2000, 2000]),
    ],
    ids=["temperature", "top_p", "top_k"],
)
def test_each_draft_has_its_requests_parameters(
    sampler: Any, values: Callable[[], Any], replacement: int, expected: list[float]
) -> None:
    given = values()
    ends = torch.tensor([2, 3, 6], dtype=torch.int32)
    expanded = sampler.expand_batch_to_tokens(given, ends, 6, replace_from=0, replace_to=replacement)
    assert expanded.dtype == given.dtype
    assert torch.equal(expanded, torch.tensor(expected, dtype=given.dtype)), expanded


def test_requests_without_drafts_have_no_place(sampler: Any) -> None:
    ends = torch.tensor([0, 2, 2], dtype=torch.int32)
    assert sampler.expand_batch_to_tokens(torch.tensor([0.1, 0.2, 0.3]), ends, 2).tolist() == pytest.approx([0.2, 0.2])
