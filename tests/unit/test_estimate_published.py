"""The estimate beside measured speeds: how near it is, and that docs/estimate.md says what the program prints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vllm_spark.cli import main
from vllm_spark.estimate.agreement import (
    LARGE,
    Compared,
    by_others,
    compare,
    explanations,
    mean_error,
    own,
    predict,
    several_sequences,
)
from vllm_spark.estimate.collectives import NCCL
from vllm_spark.estimate.experts import distinct_experts
from vllm_spark.estimate.gpu import GB10
from vllm_spark.estimate.published import BY_OTHERS, OWN, SEVERAL_SEQUENCES, STEP_OF_8_47_MS, Published
from vllm_spark.estimate.step import ATTENTION, COLLECTIVES, HEAD, ORDER

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs" / "estimate.md", ROOT / "README.md"


def case(words: str) -> Published:
    return next(each for each in BY_OTHERS if each.what.startswith(words))


def one_error(each: Published) -> float:
    return compare(each).errors[0]


def test_the_means_are_within_the_targets() -> None:
    assert mean_error(by_others()) < 0.12
    assert mean_error(own()) < 0.10
    assert max(abs(error) for each in own() for error in each.errors) < 0.12


def test_a_mean_leaves_out_bad_set_ups_alone() -> None:
    plain = Compared(replace(OWN[0], bad_setup=False), (3.82 * 1.1, 4.73 * 0.7, 5.79))
    bad = Compared(replace(OWN[0], bad_setup=True), (38.2, 47.3, 57.9))
    assert plain.errors == pytest.approx((0.1, -0.3, 0))
    assert mean_error([plain, bad]) == pytest.approx(0.4 / 3)


def test_every_large_error_is_explained() -> None:
    large = [each for each in (*by_others(), *several_sequences(), *own()) if max(map(abs, each.errors)) > LARGE]
    assert large
    assert all(each.case.why for each in large)
    assert len(explanations(large)) == len(large)


def test_the_page_has_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--published"]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.strip().splitlines()]
    page = PAGE.read_text(encoding="utf-8")
    block = page.partition("<!-- vllm-spark estimate --published -->\n")[2].partition("\n<!-- end -->")[0]
    assert block.splitlines() == printed


def test_readme_shows_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    command, _, rest = README.read_text(encoding="utf-8").partition("    vllm-spark estimate ")[2].partition("#")
    shown = [line.removeprefix("    ") for line in rest.splitlines()[1:] if line.startswith("    ")][:2]
    assert main(["estimate", *command.split()]) == 0
    assert set(shown) <= set(capsys.readouterr().out.splitlines())
    assert len(shown) == 2


def test_without_anything_hidden_nccl_in_graphs_makes_6_percent_less() -> None:
    whole = replace(case("Qwen3-Coder-30B-A3B INT4, EAGLE3, TP=2, NCCL in"), collectives=replace(NCCL, hidden=0.0))
    assert one_error(whole) == pytest.approx(-0.055, abs=0.005)


def test_what_the_output_head_takes_of_the_step_without_speculation() -> None:
    slow = case("Qwen3-Coder-30B-A3B INT4, TP=1")
    step, _ = predict(slow, 1)
    assert (round(step.us / 1e3, 1), round(step.part_us(HEAD) / 1e3, 1)) == (13.5, 3.6)
    fast = replace(slow, gpu=replace(GB10, one_row_gbytes_per_s=GB10.gbytes_per_s))
    assert one_error(fast) == pytest.approx(-0.08, abs=0.01)


def test_what_qwen3_235b_took_longer() -> None:
    compared = compare(case("Qwen3-235B"))
    longer = [1e3 * (1 / there - 1 / here) for there, here in zip(compared.measured, compared.predicted, strict=True)]
    assert longer[0] == pytest.approx(11, abs=1)
    step, _ = predict(compared.case, 1)
    (collectives,) = (part for part in step.parts if part.name == COLLECTIVES)
    assert collectives.kernels == 190
    assert longer[0] * 1e3 / 190 == pytest.approx(60, abs=4)


def test_what_the_bad_set_up_cost() -> None:
    bad = case("Qwen3.6-27B")
    step, _ = predict(bad, 1)
    measured = 1e3 / compare(bad).measured[0]
    assert (round(measured), round(measured - step.us / 1e3)) == (119, 54)
    (collectives,) = (part for part in step.parts if part.name == COLLECTIVES)
    assert collectives.kernels == 130
    assert predict(replace(bad, tp=1, collectives=None), 1)[1] == pytest.approx(8.2, abs=0.05)


def test_how_fast_the_kv_cache_of_minimax_was_read() -> None:
    near, far = (case(f"MiniMax-M2.5 INT4, TP=2, NCCL in graphs, Ray{words}") for words in ("", ", 16K"))
    (kept,) = (part for part in predict(far, 1)[0].parts if part.name == ATTENTION)
    (empty,) = (part for part in predict(near, 1)[0].parts if part.name == ATTENTION)
    read = kept.read_bytes - empty.read_bytes
    longer = 1e3 / far.values[0][0] - 1e3 / near.values[0][0]
    assert (round(read / 1e9, 1), round(longer), round(read / longer / 1e6)) == (2.1, 14, 147)


def test_how_many_experts_gpt_oss_can_have_read() -> None:
    many = next(each for each in SEVERAL_SEQUENCES if each.tp == 1)
    step_us = many.batches[-1] / many.values[-1][0] * 1e6
    of_one = 36 * 3 * 2880 * 2880 * (0.5 + 1 / 32)  # without padding
    assert step_us * GB10.gbytes_per_s * 1e3 / of_one == pytest.approx(50, abs=1)
    assert round(distinct_experts(128, 4, many.batches[-1])) == 68


def test_the_published_parts_add_up_to_the_token() -> None:
    assert sum(milliseconds for _, milliseconds, _ in STEP_OF_8_47_MS) == pytest.approx(8.47)
    named = [name for _, _, names in STEP_OF_8_47_MS for name in names]
    assert len(named) == len(set(named))
    assert set(named) <= set(ORDER)


def test_no_figure_lacks_its_source() -> None:
    for each in (*BY_OTHERS, *SEVERAL_SEQUENCES, *OWN):
        assert each.source
        assert len(each.values) == len(each.batches)
        assert all(0 < least <= most for least, most in each.values)
