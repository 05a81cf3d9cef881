"""`vllm-spark tune MODEL --from-times`: medians decide, not the luckiest time, and only against vLLM's own choice."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_spark.cli import main
from vllm_spark.cli import tune as tune_command
from vllm_spark.errors import ConfigurationError
from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.fused_moe.check import check_fused_moe_table
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, vllm_row
from vllm_spark.kernels.fused_moe.table import FusedMoeTable, load_fused_moe_provenance, load_fused_moe_table
from vllm_spark.tune.fused_moe.from_times import COLUMNS, Candidate, evaluate, read_times

from .tuning_outcomes import BF16, FP8_BLOCK, INT4, shipped

HEADER = ",".join(COLUMNS) + "\n"


def key(row: dict[str, int]) -> Candidate:
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
    return tuple(row[name] for name in names)


def own(shape: FusedMoeExperts, tokens: int) -> Candidate:
    return key(vllm_row(shape, GB10.name, tokens))


FAST, FASTER = (16, 32, 128, 1, 4, 4), (16, 32, 64, 1, 4, 4)


def test_a_row_is_used_if_its_median_is_lower_than_that_of_vllms_choice() -> None:
    times: dict[int, dict[Candidate, list[float]]] = {
        1: {own(BF16, 1): [100.0], FAST: [90.0]},
        2: {own(BF16, 2): [100.0], FAST: [99.0]},
        4: {FAST: [90.0]},
    }
    results = {each.tokens: each for each in evaluate(times, BF16, GB10.name)}
    assert [results[tokens].used for tokens in (1, 2, 4)] == [True, False, False]
    assert results[1].gain == pytest.approx(0.1)
    assert results[4].vllm_us is None is results[4].gain


def test_the_median_decides_not_the_luckiest_time() -> None:
    times = {1: {own(BF16, 1): [100.0], FAST: [95.0, 95.0, 95.0], FASTER: [99.0, 99.0, 60.0]}}
    (result,) = evaluate(times, BF16, GB10.name)
    assert (key(result.row), result.microseconds, result.repetitions) == (FAST, 95.0, 3)


def test_of_equal_rows_the_one_that_is_good_for_most_sizes() -> None:
    times = {
        1: {own(BF16, 1): [100.0], FAST: [80.5], FASTER: [80.0]},
        2: {own(BF16, 2): [100.0], FAST: [80.0], FASTER: [90.0]},
        4: {own(BF16, 4): [100.0], FAST: [80.0], FASTER: [90.0]},
    }
    assert {key(each.row) for each in evaluate(times, BF16, GB10.name)} == {FAST}


def test_times_of_a_kernel_that_does_not_serve_are_left_out() -> None:
    """Of int4 in steps of few tokens: of 128 experts, top 8, Triton's kernel is measured from 97 tokens on."""
    candidates: dict[Candidate, list[float]] = {(64, 64, 32, 1, 4, 3): [100.0], (32, 128, 32, 1, 4, 3): [90.0]}
    (result,) = evaluate({8: candidates, 96: candidates, 97: candidates}, INT4, GB10.name)
    assert (result.tokens, result.used) == (97, True)


def test_rows_that_do_not_fit_shared_memory_are_left_out() -> None:
    large, small = (64, 256, 256, 1, 4, 3), (32, 128, 256, 1, 4, 3)
    (result,) = evaluate({97: {large: [80.0], small: [90.0]}}, INT4, GB10.name)
    assert key(result.row) == small
    with pytest.raises(ConfigurationError, match="no candidate for 97 tokens fits"):
        evaluate({97: {large: [80.0]}}, INT4, GB10.name)


def test_blocks_of_fp8_weights_limit_the_tile() -> None:
    times = {1: {own(FP8_BLOCK, 1): [100.0], (16, 32, 256, 1, 4, 5): [91.0], (16, 32, 128, 1, 4, 5): [89.0]}}
    (result,) = evaluate(times, FP8_BLOCK, GB10.name)
    assert (result.row["BLOCK_SIZE_K"], result.microseconds, result.repetitions) == (128, 90.0, 2)


# The file.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no column M, BLOCK_M"),
        ("M,BLOCK_M\n1,16\n", "has no column BLOCK_N"),
        (HEADER, "has no time"),
        (HEADER + "1,16,32,64,1,4,3,\n", "has no time"),
        (HEADER + "0,16,32,64,1,4,3,5\n", "line 2 of"),
        (HEADER + "1,16,32,64,1,4,3,5\n1,16,x,64,1,4,3,5\n", "line 3 of"),
        (HEADER + "1,16,32,64,1,4,3,nan\n", "nan is not a time"),
        (HEADER + "1,16,32,64,1,4,3,-1\n", "-1 is not a time"),
        (HEADER + "1,16\n", "line 2 of"),
    ],
)
def test_one_sentence_for_a_broken_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "times.csv"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_times(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "times.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_times(path)


# The command.


def tune(*words: str) -> int:
    parser = argparse.ArgumentParser()
    tune_command.add_arguments(parser)
    return tune_command.run(parser.parse_args(words))


def times_of_int4(path: Path, fast_us: int) -> Path:
    """Times of a step of few tokens and of one of many: vLLM's own tile takes 100 us, another one `fast_us`."""
    lines = [f"{tokens},64,64,32,1,4,3,100\n{tokens},32,128,128,1,4,3,{fast_us}\n" for tokens in (8, 1024)]
    path.write_text(HEADER + "".join(lines))
    return path


def test_the_command_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["qwen3.5-122b-a10b-int4", "--from-times", str(times_of_int4(tmp_path / "times.csv", 90))]
    assert main(["tune", *words, "--source", "a forum", "--output", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    path = tmp_path / "fused_moe" / "E=256,N=512,device_name=NVIDIA_GB10,dtype=int4_w4a16.json"
    assert f"Written: {path}" in shown
    assert "another kernel of int4 there than serves: the times for 8 tokens" in shown
    rows, provenance = load_fused_moe_table(path).rows, load_fused_moe_provenance(path)
    assert provenance is not None
    assert [tokens for tokens, row in provenance.rows.items() if row.source == "a forum"] == [1024]
    assert provenance.models == ("qwen3.5-122b-a10b-int4 TP=2",)
    for tokens in (1, 8, 64, 192, 1023, 4096):
        assert "BLOCK_SIZE_N" not in FusedMoeTable(rows).row(tokens), "vLLM's choice below and above"
    assert [each.sentence for each in check_fused_moe_table(path, None, None) if each.kind == "error"] == []
    assert main(["tune", *words, "--source", "a forum", "--output", str(tmp_path)]) == 0
    assert "a copy of it is" in " ".join(capsys.readouterr().out.split())


def test_without_a_faster_row_no_table_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = times_of_int4(tmp_path / "times.csv", 99)
    words = ["qwen3.5-122b-a10b-int4", "--from-times", str(times), "--source", "a forum"]
    assert main(["tune", *words, "--output", str(tmp_path / "new")]) == 0
    assert "no table was written" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["qwen3-30b-a3b-int4", "--from-times", "{tmp}/times.csv"], "--from-times needs --source"),
        (["qwen3-30b-a3b-int4", "--source", "x"], "--source is an option of --from-times"),
        (["qwen3-30b-a3b-int4", "--device", "NVIDIA_GB10"], "--device is an option of --from-times"),
        (["qwen3-30b-a3b-int4", "--from-times", "{tmp}/none.csv", "--source", "x"], "none.csv cannot be read"),
        (["qwen3-30b-a3b-int4", "--tp", "1,2", "--from-times", "{tmp}/t", "--source", "x"], "names 2 sizes"),
        (["llama-3.3-70b-int4", "--from-times", "{tmp}/t", "--source", "x"], "nothing to tune"),
        (["{tmp}/two", "--from-times", "{tmp}/t", "--source", "x"], "has 2 shapes of experts"),
    ],
)
def test_bad_input_costs_a_sentence(tmp_path: Path, words: list[str], part: str) -> None:
    known: dict[str, Any] = shipped("qwen3-30b-a3b-int4")
    (tmp_path / "two").mkdir()
    ignored: dict[str, Any] = {"dynamic": {"-:.*layers\\.0\\..*": {}}}
    (tmp_path / "two" / "config.json").write_text(
        json.dumps(known | {"quantization_config": known["quantization_config"] | ignored})
    )
    with pytest.raises(ConfigurationError) as caught:
        tune(*(word.format(tmp=tmp_path) for word in words))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
