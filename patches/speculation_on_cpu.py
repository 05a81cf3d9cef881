"""Gives each draft token its request's temperature, top-k and top-p on vLLM's CPU build.

There vLLM's own function writes into a copy of its result and returns uninitialised memory: the two ranks of a pair
would sample with different temperatures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    def expand_batch_to_tokens(
        x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Any:
        if x.device.type != "cpu":
            return original(x, cu_num_tokens, num_tokens, replace_from=replace_from, replace_to=replace_to)
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)

    return expand_batch_to_tokens


PATCH = Patch(
    name="speculation-on-cpu",
    anchor=Anchor("vllm.v1.sample.rejection_sampler:expand_batch_to_tokens"),
    reason="a plain function without a hook, whose CPU kernel writes into a copy of the result",
    feature="the same tokens on both ranks for speculation with a temperature on CPUs",
    fingerprints={"45917014a42d": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    when="serving",
)
