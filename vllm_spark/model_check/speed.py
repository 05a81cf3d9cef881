"""Findings about the predicted speed of a model on a pair of GB10, and about the format of its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from vllm_spark.collective.link_model import PUBLISHED_FIGURES
from vllm_spark.doctor.finding import Finding
from vllm_spark.estimate.collectives import over_the_cable
from vllm_spark.estimate.gpu import GB10
from vllm_spark.estimate.model import Model, bytes_of_weight, dense_bytes, expert_bytes, read_model, stored_as
from vllm_spark.estimate.pair import PAYS, Candidate, Settings, estimate, speed
from vllm_spark.estimate.speculation import Speculation
from vllm_spark.estimate.step import Workload
from vllm_spark.models.weights import Bf16, Fp8Block, Fp8Channel, Int4, Int8, Mxfp4, Nvfp4, Weights
from vllm_spark.ranks import WORLD_SIZE

_CONTEXT = 1024
_WIDE = 0.75  # bytes of a weight from which on four bits would make steps clearly shorter
_FOUR_BITS = Int4(128)


def check_speed(name: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    """What `vllm-spark estimate` predicts for one sequence, and what fewer bits would change.

    Args:
        name: of the model.
        config: the content of its config.json.

    Raises:
        ConfigurationError: the model is not supported, or two machines cannot divide it.
    """
    work, link = Workload(1, _CONTEXT), over_the_cable(PUBLISHED_FIGURES)
    found = estimate(name, config, Settings(gpu=GB10, work=work, collectives=(link,)), lambda tp: None)
    one, two = found.candidates[:2]
    yield _pays(name, one, two)
    model = read_model(config, WORLD_SIZE)
    narrow = stored_as(model, _FOUR_BITS)
    faster = speed(replace(narrow, head=model.head), work, GB10, link, Speculation(0, 0.0, None))[1]
    yield _format(name, model, two.tokens_per_s, faster)


def _pays(name: str, one: Candidate, two: Candidate) -> Finding:
    title = "Predicted on a pair of GB10"
    command = f"vllm-spark estimate {name}   # part by part"
    value = f"{two.tokens_per_s:.3g} tokens per second for one sequence"
    if not two.memory.fits:
        return Finding(
            "model.speed",
            title,
            "problem",
            f"half of it takes {two.memory.weights / 1e9:.0f} GB",
            f"vLLM may use {two.memory.usable / 1e9:.0f} GB of each machine. Take a smaller model or fewer bits.",
            command,
        )
    weights = f"; {two.memory.weights / 1e9:.1f} GB of weights on each"
    if not one.memory.fits:
        return Finding("model.speed", title, "ok", f"{value}, and one machine alone cannot hold it{weights}")
    ratio = two.tokens_per_s / one.tokens_per_s
    value += f", {ratio:.2f} times one machine's {one.tokens_per_s:.3g}{weights}"
    if ratio >= PAYS:
        return Finding("model.speed", title, "ok", value)
    return Finding(
        "model.speed",
        title,
        "note",
        value,
        "The second machine hardly pays here: two machines that each serve half of the requests make more tokens.",
        command,
    )


def _format(name: str, model: Model, tokens_per_s: float, faster: float) -> Finding:
    title = "Format of its weights"
    sizes: Counter[Weights] = Counter()
    for layer in model.dense:
        sizes[layer.weights] += int(layer.count * dense_bytes(layer))
    for block in model.experts:
        sizes[block.weights] += int(block.count * block.experts * expert_bytes(block))
    whole = sum(sizes.values()) or 1
    shares = [(weights, size / whole) for weights, size in sizes.most_common() if size / whole >= 0.005]
    value = ", ".join(f"{share:.0%} of the bytes in {_named(weights)}" for weights, share in shares)
    most = shares[0][0]
    if bytes_of_weight(most, model.hidden) < _WIDE:
        return Finding("model.format", title, "ok", value)
    return Finding(
        "model.format",
        title,
        "note",
        value,
        f"A step reads every active weight. In INT4 this model would make {faster:.3g} tokens per second in place of "
        f"{tokens_per_s:.3g} (predicted for one sequence), and take less memory.",
        f"vllm-spark estimate {name}   # the same for the config.json of a version in INT4 shows its memory",
    )


def _named(weights: Weights) -> str:
    if isinstance(weights, Int4 | Int8):
        bits = 4 if isinstance(weights, Int4) else 8
        return f"INT{bits}" + (f" (groups of {weights.group_size})" if weights.group_size > 0 else "")
    if isinstance(weights, Fp8Block):
        return "fp8 (blocks of {} x {})".format(*weights.block)
    names: dict[type[Weights], str] = {Fp8Channel: "fp8", Mxfp4: "MXFP4", Nvfp4: "NVFP4", Bf16: "bfloat16"}
    return names[type(weights)]
