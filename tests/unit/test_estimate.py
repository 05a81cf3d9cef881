"""A predicted decode step: what must hold whatever the constants are."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spark.collective.link_model import PUBLISHED_FIGURES, WireFigures
from vllm_spark.errors import ConfigurationError
from vllm_spark.estimate import collectives as known
from vllm_spark.estimate.collective_file import load_collectives
from vllm_spark.estimate.collectives import NCCL, NCCL_EAGER, Collectives, fixed, over_the_cable
from vllm_spark.estimate.experts import busier_half, distinct_experts, independent_rows
from vllm_spark.estimate.gpu import GB10, GPUS, H200, with_bandwidth
from vllm_spark.estimate.model import Model, read_model
from vllm_spark.estimate.pair import Settings, estimate
from vllm_spark.estimate.published import EAGLE3_HEAD
from vllm_spark.estimate.speculation import Speculation, eagle_head
from vllm_spark.estimate.step import (
    ATTENTION,
    COLLECTIVES,
    EXPERTS,
    HOST,
    MLP,
    ORDER,
    PROJECTIONS,
    Step,
    Workload,
    collective_calls,
    decode_step,
)
from vllm_spark.models.config import read_model_config

NAMES = (
    "qwen3-coder-30b-a3b-int4",
    "llama-3.3-70b-int4",
    "gpt-oss-120b",
    "qwen3-next-80b-a3b-int4",
    "glm-4.5-air-int4",
    "qwen3.5-122b-a10b-int4",
)
MODELS = {(name, tp): read_model(read_model_config(name)[1], tp) for name in NAMES for tp in (1, 2)}
CABLE = over_the_cable()
BATCHES = st.integers(1, 128)
CONTEXTS = st.integers(0, 200_000)

models = st.sampled_from(list(MODELS.values()))
workloads = st.builds(Workload, BATCHES, CONTEXTS, rows=st.integers(1, 8), kv_bytes=st.sampled_from([1.0, 2.0]))
gpus = st.sampled_from(list(GPUS.values()))
implementations = st.sampled_from([CABLE, NCCL, NCCL_EAGER, fixed(20), known.DIRECT])


def coder(tp: int) -> Model:
    return MODELS["qwen3-coder-30b-a3b-int4", tp]


@settings(deadline=None)
@given(models, workloads, gpus, implementations)
def test_parts_add_up_to_the_step(model: Model, work: Workload, gpu: Any, collectives: Collectives) -> None:
    step = decode_step(model, work, gpu, collectives)
    assert step.us == pytest.approx(sum(part.us for part in step.parts))
    assert [part.name for part in step.parts] == [name for name in ORDER if step.part_us(name)]
    assert all(part.us > 0 for part in step.parts)
    assert step.hidden_us >= 0
    assert (step.part_us(COLLECTIVES) > 0) == (model.tp == 2)


@settings(deadline=None)
@given(models, workloads, implementations, st.floats(50, 5000), st.floats(1, 10))
def test_more_bandwidth_is_never_slower(
    model: Model, work: Workload, collectives: Collectives, gbytes_per_s: float, times: float
) -> None:
    slow, fast = (with_bandwidth(GB10, rate) for rate in (gbytes_per_s, gbytes_per_s * times))
    assert decode_step(model, work, fast, collectives).us <= decode_step(model, work, slow, collectives).us * 1.000001


@settings(deadline=None)
@given(models, workloads, st.integers(1, 100_000), implementations)
def test_a_longer_context_is_never_faster(model: Model, work: Workload, more: int, collectives: Collectives) -> None:
    longer = replace(work, context=work.context + more)
    assert decode_step(model, longer, GB10, collectives).us >= decode_step(model, work, GB10, collectives).us


@settings(deadline=None)
@given(models, CONTEXTS, st.integers(1, 64), implementations)
def test_twice_the_sequences_make_no_fewer_tokens(
    model: Model, context: int, batch: int, collectives: Collectives
) -> None:
    one, two = (
        decode_step(model, Workload(sequences, context), GB10, collectives).us for sequences in (batch, 2 * batch)
    )
    assert two <= 2 * one
    assert two >= one or batch == 1  # cuBLAS takes longer for one row than for two


@settings(deadline=None)
@given(st.sampled_from(NAMES), workloads)
def test_the_second_machine_halves_what_is_read_but_for_small_parts(name: str, work: Workload) -> None:
    whole, half = (decode_step(MODELS[name, tp], work, GB10, None) for tp in (1, 2))
    for part in whole.parts:
        if part.name in (EXPERTS, PROJECTIONS):
            (of_half,) = (each for each in half.parts if each.name == part.name)
            padding = 1.1 if name == "gpt-oss-120b" else 1.07 if name == "glm-4.5-air-int4" else 1.001
            assert part.read_bytes / 2 <= of_half.read_bytes * 1.001 <= part.read_bytes / 2 * padding
    assert half.us < whole.us + GB10.pair_us


@settings(deadline=None)
@given(st.integers(1, 512), st.integers(1, 16), st.floats(1, 500), st.floats(1, 4), st.floats(0, 3), st.floats(0, 2))
def test_distinct_experts_are_bounded_and_grow(
    experts: int, top_k: int, rows: float, times: float, skew: float, more: float
) -> None:
    top_k = min(top_k, experts)
    read = distinct_experts(experts, top_k, rows, skew)
    assert distinct_experts(experts, top_k, rows, skew + more) <= read * 1.000001
    assert distinct_experts(experts, top_k, 1, skew) == pytest.approx(top_k)
    assert min(top_k, experts) <= read * 1.000001
    assert read <= min(experts, rows * top_k) * 1.000001
    assert distinct_experts(experts, top_k, rows * times, skew) >= read
    assert read / 2 <= busier_half(experts, read) <= experts


@pytest.mark.parametrize(("experts", "top_k", "rows"), [(4, 2, 1), (4, 2, 2), (5, 2, 3), (5, 3, 2), (4, 4, 2)])
def test_distinct_experts_are_the_mean_over_all_choices(experts: int, top_k: int, rows: int) -> None:
    choices = list(itertools.combinations(range(experts), top_k))
    counts = [len(set().union(*chosen)) for chosen in itertools.product(choices, repeat=rows)]
    assert distinct_experts(experts, top_k, rows, skew=0) == pytest.approx(sum(counts) / len(counts))


@pytest.mark.parametrize(
    ("sequences", "rows", "measured"),
    [
        *((1, 1, 8), (1, 2, 12.6), (1, 3, 17.0), (1, 4, 21.5), (1, 5, 24.4), (1, 8, 34.5)),
        *((2, 4, 40.5), (2, 5, 48.2), (3, 4, 54.0), (4, 4, 64.8)),
    ],
)
def test_sequences_read_the_experts_that_were_counted(sequences: int, rows: int, measured: float) -> None:
    """GLM-5.3-Flash on GB10 (docs/ROOFLINE.md of InterfaceX-co-jp/glm53-tensorfold-spark)."""
    assert distinct_experts(288, 8, independent_rows(sequences, rows)) == pytest.approx(measured, rel=0.06)


def test_the_busier_of_two_halves_is_the_mean_over_all_draws() -> None:
    draws = list(itertools.combinations(range(12), 4))
    busier = [max(len([x for x in drawn if x < 6]), len([x for x in drawn if x >= 6])) for drawn in draws]
    assert busier_half(12, 4) == pytest.approx(sum(busier) / len(busier), rel=0.06)
    assert busier_half(12, 12) == 6


@pytest.mark.parametrize(
    ("experts", "rows", "measured_us"), [(51.6, 8, (32.7, 20.8)), (8, 1, (10.7, 9.8))], ids=["8 tokens", "1 token"]
)
def test_marlin_on_an_h200_takes_what_was_measured(experts: float, rows: int, measured_us: tuple[float, float]) -> None:
    """Whole experts of Qwen3-30B-A3B, gate and up together and down (benchmarks/NOTES.md, entry 9)."""
    assert distinct_experts(128, 8, rows, skew=0) == pytest.approx(experts, rel=0.01)
    for share, measured in zip((2 / 3, 1 / 3), measured_us, strict=True):
        size = experts * 3 * 2048 * 768 * (0.5 + 2 / 128) * share
        predicted = H200.packed_us + size / H200.four_bit_gbytes_per_s / 1e3
        assert predicted == pytest.approx(measured, rel=0.16)


@settings(deadline=None)
@given(implementations, st.integers(1, 64 << 20), st.integers(1, 1 << 20))
def test_a_larger_collective_is_never_faster_and_never_waits_less_than_nothing(
    collectives: Collectives, size: int, more: int
) -> None:
    assert collectives.exposed_us(size) > 0
    assert collectives.alone_us(size) <= collectives.alone_us(size + more)


@pytest.mark.parametrize(("size", "measured"), [(4096, 8.0), (8192, 9.1), (128 << 10, 20.3), (480 << 10, 39.0)])
def test_ours_over_the_published_link_take_what_was_measured(size: int, measured: float) -> None:
    """Over the modelled link of two GB10 (benchmarks/NOTES.md, entry 17)."""
    assert CABLE.alone_us(size) == pytest.approx(measured, rel=0.02)


def test_a_slower_link_takes_longer_by_its_own_time() -> None:
    slow = WireFigures.alpha_beta(20, 1)
    differ = over_the_cable(slow).alone_us(8192) - CABLE.alone_us(8192)
    assert differ == pytest.approx(slow.floor_us(8192) - PUBLISHED_FIGURES.floor_us(8192))


def test_how_many_collectives_a_step_has() -> None:
    assert collective_calls(coder(2), 2) == [(2 * 2048 * 2, 97), (2 * 75968 * 2, 1)]
    head = eagle_head(EAGLE3_HEAD, 2)
    assert sum(count for _, count in collective_calls(head, 1)) == 4, "docs/speculation.md"


@settings(deadline=None)
@given(st.integers(0, 8), st.floats(0, 1), st.floats(0, 1))
def test_tokens_of_a_step(drafted: int, acceptance: float, more: float) -> None:
    tokens = Speculation(drafted, acceptance, None).tokens
    assert 1 <= tokens <= drafted + 1
    assert Speculation(drafted, min(1.0, acceptance + more), None).tokens >= tokens
    assert Speculation(drafted, 1.0, None).tokens == drafted + 1


def test_a_draft_costs_its_pass_for_each_token_and_ngram_costs_nothing() -> None:
    work = Workload(context=100, rows=4)
    costs = Speculation(3, 0.5, eagle_head(EAGLE3_HEAD, 2)).cost(work, GB10, CABLE)
    assert len(costs) == 3
    assert all(cost.us == costs[0].us > 0 for cost in costs)
    assert costs[0].us > Speculation(1, 0.5, eagle_head(EAGLE3_HEAD, 2)).cost(work, GB10, None)[0].us
    assert Speculation(3, 0.5, None).cost(work, GB10, CABLE) == []


def test_verifying_drafted_tokens_reads_fewer_experts_than_as_many_sequences() -> None:
    def experts(work: Workload) -> float:
        return decode_step(coder(1), work, GB10, None).part_us(EXPERTS)

    assert experts(Workload(1)) < experts(Workload(1, rows=4)) < experts(Workload(4))


def test_expert_parallelism_waits_for_the_rank_with_more_experts() -> None:
    config = read_model_config("qwen3-coder-30b-a3b-int4")[1]
    divided, whole = (read_model(config, 2, expert_parallel) for expert_parallel in (False, True))
    shares = [decode_step(model, Workload(), GB10, None).part_us(EXPERTS) for model in (divided, whole)]
    assert 1.2 < shares[1] / shares[0] < 1.35  # 5.09 of 8 experts instead of 4
    assert read_model(config, 1, True) == read_model(config, 1)


def test_many_rows_take_the_time_of_their_arithmetic() -> None:
    rows = 1 << 14
    dense = decode_step(MODELS["llama-3.3-70b-int4", 1], Workload(rows), GB10, None)
    matrices, kernels = 80 * 3 * 8192 * 28672, 80 * 2
    seconds = 2 * rows * matrices / (GB10.tflops * 1e12)
    assert dense.part_us(MLP) == pytest.approx(seconds * 1e6 + kernels * GB10.packed_us)
    sparse = decode_step(coder(1), Workload(rows), GB10, None)
    seconds = 2 * rows * 8 * 48 * 3 * 2048 * 768 / (GB10.tflops * 1e12)
    assert sparse.part_us(EXPERTS) == pytest.approx(seconds * 1e6 + 48 * 2 * GB10.packed_us)


def test_another_bandwidth_counts_for_all_kernels() -> None:
    half = with_bandwidth(GB10, GB10.gbytes_per_s / 2)
    for name in ("gbytes_per_s", "four_bit_gbytes_per_s", "one_row_gbytes_per_s"):
        assert getattr(half, name) == getattr(GB10, name) / 2
    assert replace(half, gbytes_per_s=0, four_bit_gbytes_per_s=0, one_row_gbytes_per_s=0) == replace(
        GB10, gbytes_per_s=0, four_bit_gbytes_per_s=0, one_row_gbytes_per_s=0
    )


def test_the_kv_cache_is_read_at_the_memorys_bandwidth() -> None:
    near, far = (decode_step(coder(2), Workload(1, context), GB10, None) for context in (0, 16384))
    read = 48 * 16384 * 2 * 2 * 128 * 2
    assert far.part_us(ATTENTION) - near.part_us(ATTENTION) == pytest.approx(read / GB10.gbytes_per_s / 1e3)


def candidates(name: str, **changes: Any) -> Any:
    asked = replace(Settings(GB10, Workload(context=1000), (CABLE, NCCL)), **changes)
    return estimate(name, read_model_config(name)[1], asked, lambda tp: None)


def test_does_the_second_machine_pay() -> None:
    pays = candidates("llama-3.3-70b-int4").verdict
    assert pays.startswith("TP=2 pays: two machines make 1.9")
    assert pays.count(".") == pays.count(".", 0, -1) + 1
    slow = candidates("qwen3-coder-30b-a3b-int4", collectives=(fixed(200),)).verdict
    assert slow.startswith("TP=2 does not pay: two machines make 0.")
    hardly = candidates("qwen3-coder-30b-a3b-int4", collectives=(fixed(50),)).verdict
    assert hardly.startswith("TP=2 hardly pays")
    needed = candidates("qwen3-235b-a22b-int4").verdict
    assert needed.startswith("TP=2 is needed: one machine would need 123 GB, and vLLM may use 102 GB of it")
    neither = candidates("qwen3-235b-a22b-int4", utilization=0.4).verdict
    assert neither.startswith("It fits on neither one nor two machines: half of it takes 62 GB")


def test_half_of_the_batch_on_each_machine_is_said_of_a_batch() -> None:
    assert "half of the batch" not in candidates("llama-3.3-70b-int4").verdict
    many = candidates("llama-3.3-70b-int4", work=Workload(8, 1000))
    alone = candidates("llama-3.3-70b-int4", work=Workload(4, 1000)).candidates[0]
    assert many.separately == pytest.approx(2 * alone.tokens_per_s)
    assert f"half of the batch each make {many.separately:.3g}." in many.verdict


def test_sequences_keep_their_context_and_the_steps_rows() -> None:
    asked = {"work": Workload(4, 1000), "drafted": 2, "acceptance": 0.5}
    for each in candidates("qwen3-coder-30b-a3b-int4", **asked).candidates:
        assert each.memory.sequences == 4 * (1000 + 3) * 48 * 2 * 4 // each.tp * 128 * 2


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 64), st.integers(1, 100_000))
def test_what_fits_has_room_for_its_tokens(batch: int, context: int) -> None:
    for each in candidates("qwen3-coder-30b-a3b-int4", work=Workload(batch, context)).candidates:
        memory = each.memory
        assert memory.fits == (memory.weights + memory.sequences + memory.communicators <= memory.usable)
        if memory.fits:
            token = 48 * 2 * 4 // each.tp * 128 * 2
            rest = memory.usable - memory.weights - memory.sequences - memory.communicators
            assert memory.more_tokens == pytest.approx(rest / token, abs=1)


def measured_rows(**change: Any) -> list[dict[str, Any]]:
    rows = [
        {"candidate": name, "mode": mode, "bytes": size, "median": us, "minimum": us, "p99": us}
        for name, mode, size, us in [
            ("wire", "graph", 65536, 17.0),
            ("wire", "graph", 4096, 8.0),
            ("wire", "eager", 4096, 30.0),
            ("NCCL 2.28.9, host memory", "graph", 4096, 20.0),
            ("NCCL 2.28.9, host memory", "graph", 65536, 26.0),
            ("once", "graph", 4096, 1.0),
        ]
    ]
    rows[0] |= change
    return rows


def test_measured_collectives_are_read_from_the_benchmarks_file(tmp_path: Path) -> None:
    file = tmp_path / "collectives.json"
    file.write_text(json.dumps({"machine": "any", "rows": measured_rows()}))
    wire, nccl = load_collectives(file)
    assert (wire.name, wire.points, nccl.name) == ("wire", ((4096, 8.0), (65536, 17.0)), "NCCL 2.28.9, host memory")
    assert wire.alone_us(4096) == 8.0
    assert (wire.rank_bytes, nccl.rank_bytes) == (0, known.NCCL_BYTES)
    assert nccl.hidden == known.NCCL_HIDDEN > wire.hidden


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "are invalid: invalid JSON"),
        ("[]", "are invalid"),
        (json.dumps({"rows": measured_rows(median=-1)}), "rows.0.median"),
        (json.dumps({"rows": []}), "have no times in CUDA graphs"),
        (json.dumps({"rows": measured_rows(), "settings": {"collective": "all_gather"}}), "settings.collective"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_file_of_collectives_that_is_none(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "collectives.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        load_collectives(file)
    assert words in str(caught.value)
    assert "vllm-spark bench collective --json FILE" in str(caught.value)


def test_a_second_machine_costs_the_host_more() -> None:
    def host(step: Step) -> float:
        return step.part_us(HOST)

    one, two = (decode_step(coder(tp), Workload(), GB10, None) for tp in (1, 2))
    assert host(two) - host(one) == GB10.pair_us
