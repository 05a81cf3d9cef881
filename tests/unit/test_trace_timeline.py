"""Both ranks' recordings as steps and parts, as the file, the table and the picture."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from vllm_spark.errors import ConfigurationError, SparkError
from vllm_spark.estimate import step as estimated
from vllm_spark.recording import parts
from vllm_spark.recording.records import PairRecording
from vllm_spark.trace.chrome_file import trace_of, write_trace
from vllm_spark.trace.kernel_parts import COPIES, MATRICES, part_of
from vllm_spark.trace.picture import check_image, draw
from vllm_spark.trace.report import sentences, show
from vllm_spark.trace.step_parts import GPU, THREAD, delivery, lanes_of, quantile
from vllm_spark.trace.timeline import Interval, innermost, timeline_of, within

from .trace_pair import AHEAD, BEGIN, COLLECTIVES, STEP, STEPS, WAITED, pair_recording, recording


def nesting_errors(content: dict[str, Any]) -> list[str]:
    """Where intervals of one row of a trace overlap without one containing the other."""
    rows: dict[tuple[int, int], list[tuple[int, int, str]]] = defaultdict(list)
    for event in content["traceEvents"]:
        if event["ph"] == "X":
            start = round(event["ts"] * 1000)
            rows[event["pid"], event["tid"]].append((start, start + round(event["dur"] * 1000), event["name"]))
    errors = []
    for row, spans in rows.items():
        open_spans: list[tuple[int, int, str]] = []
        for span in sorted(spans, key=lambda each: (each[0], -each[1])):
            while open_spans and open_spans[-1][1] <= span[0]:
                open_spans.pop()
            if open_spans and span[1] > open_spans[-1][1]:
                errors.append(f"{row}: {span} is not within {open_spans[-1]}")
            open_spans.append(span)
    return errors


@settings(deadline=None)
@given(st.recursive(st.integers(1, 50), lambda inner: st.lists(inner, min_size=1, max_size=4), max_leaves=12))
def test_the_innermost_intervals_fill_the_outer_one(tree: Any) -> None:
    """Nested at random, with gaps: each nanosecond of the outer one belongs to exactly one part."""
    spans: list[Interval] = []

    def lay(node: Any, at: int, name: str) -> int:
        start = at
        if isinstance(node, int):
            at += node
        else:
            for index, child in enumerate(node):
                at = lay(child, at + index % 2, f"{name}.{index}")
            at += len(node)
        spans.append(Interval(name, start, at))
        return at

    end = lay(tree, 1, "x")
    found = innermost(spans)
    assert [each.start for each in found] == [1, *(each.end for each in found[:-1])]
    assert found[-1].end == end
    exclusive: dict[str, int] = defaultdict(int)
    for each in found:
        exclusive[each.part] += each.end - each.start
    for span in spans:
        children = [each for each in spans if each.part.rpartition(".")[0] == span.part]
        assert exclusive[span.part] == span.end - span.start - sum(each.end - each.start for each in children)


def test_a_stretch_is_cut_at_both_ends() -> None:
    intervals = [Interval("a", 0, 10), Interval("b", 10, 20), Interval("c", 30, 40)]
    assert within(intervals, 5, 35) == [Interval("a", 5, 10), Interval("b", 10, 20), Interval("c", 30, 35)]
    assert within(intervals, 20, 30) == []


def test_both_ranks_are_on_the_leaders_clock() -> None:
    pair = timeline_of(pair_recording())
    assert pair.chosen == tuple(range(STEPS - 1))
    assert pair.typical() in pair.chosen
    for rank in pair.ranks:
        windows = [window for window in rank.host if window is not None]
        assert [window.start for window in windows] == [BEGIN + number * STEP for number in range(STEPS - 1)]
        assert {window.measured for window in windows} == {STEP}
    sent = delivery(pair)
    assert sent.median == pytest.approx(20.0, abs=0.01)


def test_parts_add_up() -> None:
    lanes = lanes_of(timeline_of(pair_recording()))
    assert [(lane.rank, lane.lane) for lane in lanes] == [(0, THREAD), (1, THREAD)]
    for lane in lanes:
        times = {part.part: part.median for part in lane.parts}
        assert times[parts.WAIT_PEER] == pytest.approx(COLLECTIVES / 2 * WAITED / 1e3)
        assert times[parts.COLLECTIVES] == pytest.approx(COLLECTIVES * 10 - COLLECTIVES / 2 * WAITED / 1e3)
        assert times[parts.FORWARD] == pytest.approx(COLLECTIVES * 30)
        assert sum(times.values()) == pytest.approx(STEP / 1e3)
        assert lane.agrees
        assert lane.covered == pytest.approx(1)
    assert {part.part for lane in lanes for part in lane.parts if part.waits} == {parts.WAIT_STEP, parts.WAIT_PEER}


@pytest.mark.parametrize(("unexplained", "agrees"), [(30_000, True), (60_000, False)])
def test_what_no_part_explains_is_told(unexplained: int, agrees: bool) -> None:
    """At 3 % of 1,300 us."""
    pair = timeline_of(pair_recording(unexplained=unexplained))
    lanes = lanes_of(pair)
    assert [lane.agrees for lane in lanes] == [agrees] * 2
    text = " ".join(sentences(pair, lanes, []))
    assert ("DIFFER by more than 3%" in text) is not agrees


def test_a_gpu_has_its_own_steps() -> None:
    lanes = lanes_of(timeline_of(pair_recording(kernels=True)))
    assert [(lane.rank, lane.lane) for lane in lanes] == [(0, THREAD), (1, THREAD), (0, GPU), (1, GPU)]
    for lane in lanes[2:]:
        times = {part.part: part.median for part in lane.parts}
        # Of the last kernel 10 us run beside the one before it.
        assert times == {
            estimated.EXPERTS: pytest.approx(300, abs=0.01),
            estimated.COLLECTIVES: pytest.approx(50, abs=0.01),
            estimated.HOST: pytest.approx(STEP / 1e3 - 350, abs=0.01),
        }
        assert lane.agrees


def test_names_are_those_of_the_estimate_where_they_mean_the_same() -> None:
    assert (parts.COLLECTIVES, parts.HEAD, parts.DRAFT) == (estimated.COLLECTIVES, estimated.HEAD, estimated.DRAFT)


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("all_reduce_packets_bfloat16", estimated.COLLECTIVES),
        ("all_gather_payload", estimated.COLLECTIVES),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", estimated.COLLECTIVES),
        ("void marlin_moe_wna16::Marlin<__nv_bfloat16, 1125899906909960l>(int4 const*)", estimated.EXPERTS),
        ("fused_moe_kernel", estimated.EXPERTS),
        ("void vllm::moe::topkGating<8, 128>(float const*)", estimated.ROUTER),
        ("void marlin::Marlin<__nv_bfloat16>(int4 const*)", MATRICES),
        ("nvjet_tst_64x8_64x16_1x4_h_bz_TNT", MATRICES),
        ("void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16>(int)", estimated.ATTENTION),
        ("kernel_unified_attention_2d", estimated.ATTENTION),
        ("Memcpy DtoH (Device -> Pinned)", COPIES),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", estimated.NORMS),
    ],
)
def test_parts_of_kernels(kernel: str, part: str) -> None:
    assert part_of(kernel) == part


def test_a_step_with_prompts_is_not_compared() -> None:
    made = [recording(rank) for rank in (0, 1)]
    for each in made:
        each.steps[4] = each.steps[4]._replace(decode=False, tokens=100)
        each.steps[8] = each.steps[8]._replace(sequences=2)
    pair = timeline_of(PairRecording(made, pair_recording().clocks))
    assert pair.chosen == (0, 1, 2, 5, 6, 9, 10)
    assert pair.sequences == 1


def test_ranks_that_recorded_different_steps() -> None:
    leader, follower = (recording(rank) for rank in (0, 1))
    with pytest.raises(SparkError, match=r"different steps \(12 and 11\)"):
        timeline_of(PairRecording([leader, replace(follower, steps=follower.steps[1:])], pair_recording().clocks))


def test_no_decode_step() -> None:
    made = [recording(rank, steps=[]) for rank in (0, 1)]
    with pytest.raises(SparkError, match="no two decode steps in a row"):
        timeline_of(PairRecording(made, pair_recording().clocks))


@pytest.mark.parametrize("kernels", [False, True])
def test_the_file(tmp_path: Path, kernels: bool) -> None:
    pair = timeline_of(pair_recording(kernels=kernels))
    path = tmp_path / "trace.json"
    write_trace(path, pair, lanes_of(pair), {"model": "tiny"})
    content = json.loads(path.read_text())
    rows = {
        (event["pid"], event["args"]["name"])
        for event in content["traceEvents"]
        if event["ph"] == "M" and event["name"] in ("process_name", "thread_name")
    }
    assert (0, "rank 0 (leader) on desk1, process 4711") in rows
    assert (1, "rank 1 (follower) on desk2, process 4712, times within 11.0 us") in rows
    assert {name for _, name in rows} >= {"steps", "thread that runs the model", "messages posted by the proxy"}
    assert ((1, "GPU, stream 9") in rows) is kernels
    assert nesting_errors(content) == []
    times = [event["ts"] for event in content["traceEvents"] if "ts" in event]
    assert min(times) == 0
    assert max(times) < STEPS * STEP / 1e3
    about = content["otherData"]
    assert (about["follower_clock_ahead_ns"], about["clock_uncertainty_ns"]) == (AHEAD, 11_000)
    assert [lane["agrees"] for lane in about["parts_us"]] == [True] * (4 if kernels else 2)
    collectives = [event for event in content["traceEvents"] if event["name"] == "all_reduce of 2048 bytes"]
    assert len(collectives) == 2 * STEPS * COLLECTIVES
    assert collectives[0]["args"]["protocol"] == "LL"
    assert {event["args"]["waited_us"] for event in collectives} == {0.0, WAITED / 1e3}
    starts, ends = (
        {event["id"]: event for event in content["traceEvents"] if event["ph"] == kind} for kind in ("s", "f")
    )
    assert starts.keys() == ends.keys() == set(range(STEPS - 1))
    assert all(starts[number]["ts"] < ends[number]["ts"] for number in starts)


def test_a_folder_that_takes_no_file(tmp_path: Path) -> None:
    pair = timeline_of(pair_recording())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        write_trace(tmp_path / "file" / "trace.json", pair, [], {})
    with pytest.raises(ConfigurationError, match="cannot be written"):
        draw(pair, tmp_path / "none" / "trace.png", "tiny")


@pytest.mark.parametrize("kernels", [False, True])
def test_the_picture(tmp_path: Path, kernels: bool) -> None:
    draw(timeline_of(pair_recording(kernels=kernels)), tmp_path / "step.png", "tiny")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_another_kind() -> None:
    with pytest.raises(ConfigurationError, match=r"--image step.gif must end in .png, .svg, .pdf"):
        check_image(Path("step.gif"))


@pytest.mark.parametrize("kernels", [False, True])
def test_the_table(kernels: bool) -> None:
    pair = timeline_of(pair_recording(kernels=kernels))
    console = Console(width=120, record=True)
    show(console, pair, lanes_of(pair), [1310.0, 1320.0, 1305.0])
    text = console.export_text()
    assert "wait for the step (waits)" in text
    assert "model forward" in text
    assert text.count("whole step") == (2 if kernels else 1)
    assert "Times of different ranks compare within 11.0 us" in text
    assert "tokens arrived every 1,310.0 us" in text
    assert "add up to 100.0% of the measured step (median of 11 steps)." in text


def test_records_that_found_no_room_are_told() -> None:
    pair = timeline_of(pair_recording(lost=7))
    assert "14 records found no room" in " ".join(sentences(pair, lanes_of(pair), []))
    assert trace_of(pair, [], {})["otherData"]["records_that_found_no_room"] == 14


def test_a_quantile_is_interpolated() -> None:
    assert quantile([5.0], 0.9) == 5.0
    assert quantile([0.0, 10.0], 0.9) == pytest.approx(9.0)
